"""Compara dois arquivos de dados pela perda do modelo da demonstração nas mesmas perguntas. Por fora do pytest.

    python tests/medir_dados.py ANTES.jsonl DEPOIS.jsonl

Treina, uma passagem por arquivo e cada um num processo de um fio, o SmolLM2-135M da demonstração em todas as linhas
menos as da validação: cem, sorteadas entre as que os dois arquivos trazem iguais. Imprime a perda nelas, de cada um.
"""

import json
import multiprocessing
import os
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from conftest import preparar

import fine_tuning_saude as ft


def ler(arquivo: str) -> dict[tuple[str, str], ft.Par]:
    """{(pergunta, resposta): par} do arquivo."""
    pares, _ = ft.ler_dados(ft.ler_opcoes(["--arquivo-dados", arquivo]))
    return {par[1:3]: par for par in pares}


def treinar(arquivo: str, fora: list[tuple[str, str]], pasta: str) -> tuple[int, float, float]:
    """Treina nas linhas do arquivo que não estão em `fora`; (linhas, perda em `fora` antes, e depois)."""
    ft.acalmar_bibliotecas()
    opcoes = ["--demo", "--dir-saida", pasta, "--max-length", "1024", "--max-tokens-por-linha", "1024"]
    cfg = ft.ler_opcoes([*opcoes, "--save-steps", "100000"])
    base, pares = ft.preparar_modelo_demo(cfg), ler(arquivo)
    tokenizer, quantizacao = ft.carregar_tokenizer(base), ft.etapa_2_quantizacao("cpu")
    partes = [par for chave, par in pares.items() if chave not in fora], [pares[chave] for chave in fora]
    treino, validacao = (ft.codificar_dados(cfg, parte, tokenizer) for parte in partes)
    modelo = ft.etapa_4_lora(cfg, ft.etapa_3_modelo(preparar(base), quantizacao)[1])
    argumentos = ft.etapa_6_argumentos(cfg, preparar(base), quantizacao)
    perda = ft.etapa_7_treinamento(cfg, modelo, treino, validacao, argumentos)
    return len(treino), perda["antes"], perda["depois"]


def main() -> None:
    """Sorteia a validação, treina os dois ao mesmo tempo e imprime uma linha de cada."""
    os.environ["OMP_NUM_THREADS"] = "1"
    lidos = [ler(arquivo) for arquivo in sys.argv[1:3]]
    iguais = sorted(lidos[0].keys() & lidos[1].keys())
    fora = random.Random(42).sample(iguais, 100)
    print(json.dumps({"linhas iguais nos dois": len(iguais), "validação": len(fora)}, ensure_ascii=False), flush=True)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporaria, ProcessPoolExecutor(2, mp_context=spawn) as dois:
        feitos = [dois.submit(treinar, a, fora, f"{temporaria}/{i}") for i, a in enumerate(sys.argv[1:3])]
        for arquivo, feito in zip(sys.argv[1:3], feitos, strict=True):
            linhas, antes, depois = feito.result()
            print(f"{Path(arquivo).name}, treino de {linhas} linhas: perda {antes:.4f} → {depois:.4f}", flush=True)


if __name__ == "__main__":
    main()
