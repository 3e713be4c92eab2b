"""Compara valores das constantes do treino, no modelo da demonstração e com as 2.000 linhas: tests/medir_padroes.py.

Cada variante treina uma passagem com as constantes do programa, menos o que muda, num processo só seu, e mede a mesma
validação. É um modelo de 135 milhões de parâmetros: diz para que lado cada valor puxa, e não o melhor para o
Phi-3-mini.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from conftest import RAIZ, preparar

import fine_tuning_saude as ft

VARIANTES: dict[str, list[str]] = {
    "as constantes do programa": [],
    "LEARNING_RATE 1e-3": ["--learning-rate", "1e-3"],
    "LORA_R 64": ["--lora-r", "64", "--lora-alpha", "128"],
    "MAX_TOKENS_POR_LINHA 1024": ["--max-tokens-por-linha", "1024"],
}


def treinar(opcoes: list[str], demo: Path) -> dict[str, Any]:
    """Faz as etapas 1 a 7 e devolve o que a 7 mediu e os segundos de CPU do treino."""
    ft.acalmar_bibliotecas()
    with tempfile.TemporaryDirectory() as saida:
        cfg = ft.ler_opcoes(["--treinar-na-cpu", "--dir-saida", saida, "--num-train-epochs", "1", *opcoes])
        pares, _ = ft.ler_dados(cfg)
        preparo = preparar(demo)
        quantizacao = ft.etapa_2_quantizacao("cpu")
        tokenizer, modelo = ft.etapa_3_modelo(preparo, quantizacao)
        modelo = ft.etapa_4_lora(cfg, modelo)
        treino, validacao = ft.etapa_5_dados(cfg, pares, tokenizer)
        inicio = time.process_time()
        argumentos = ft.etapa_6_argumentos(cfg, preparo, quantizacao)
        medida = ft.etapa_7_treinamento(cfg, modelo, treino, validacao, argumentos)
    return medida | {"segundos": time.process_time() - inicio}


def medir(nome: str, demo: str) -> str:
    """A linha da tabela de uma variante, treinada noutro processo, com um fio só."""
    feito = subprocess.run(
        [sys.executable, __file__, "--uma", nome, demo],
        cwd=RAIZ,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if feito.returncode:
        raise SystemExit(feito.stderr)
    medida = json.loads(feito.stdout.partition("MEDIDA ")[2])
    linha = f"| {nome} | {medida['antes']:.3f} | {medida['depois']:.3f} | {medida['passo']} | "
    return linha.replace(".", ",") + f"{medida['segundos'] / 60:.0f} min |"


def main() -> None:
    """Treina as variantes, tantas de cada vez quantos são os núcleos, e imprime a tabela na ordem delas."""
    if sys.argv[1:2] == ["--uma"]:
        print("MEDIDA", json.dumps(treinar(VARIANTES[sys.argv[2]], Path(sys.argv[3]))))
        return
    with tempfile.TemporaryDirectory() as pasta, ThreadPoolExecutor(psutil.cpu_count(logical=False)) as juntas:
        demo = ft.preparar_modelo_demo(ft.ler_opcoes(["--demo", "--dir-saida", pasta]))
        print("| variante | antes | depois | passo entregue | CPU do treino |\n|---|---:|---:|---:|---:|", flush=True)
        for linha in juntas.map(medir, VARIANTES, itertools.repeat(str(demo))):
            print(linha, flush=True)


if __name__ == "__main__":
    main()
