"""Mede o portão, a tokenização e o empacotamento de um arquivo grande: python tests/medir_escala.py 200000."""

import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from conftest import linhas_reais

import fine_tuning_saude as ft


def escrever_sorteado(destino: Path, linhas: int) -> None:
    """Perguntas de 14 e respostas de 62 palavras, sorteadas entre as do arquivo do projeto, sem números."""
    textos = [linha["output"] for linha in linhas_reais()]
    palavras = [p for texto in textos for p in texto.split() if not any(c.isdigit() for c in p)]
    sorteio = random.Random(1)
    with destino.open("w", encoding="utf-8") as saida:
        for _ in range(linhas):
            par = {
                "input": " ".join(sorteio.choices(palavras, k=14)),
                "output": " ".join(sorteio.choices(palavras, k=62)),
            }
            saida.write(json.dumps(par, ensure_ascii=False) + "\n")


def cronometrar(nome: str, fazer: Callable[[], Any]) -> Any:
    """Faz, e imprime quanto levou e o pico de memória do processo até aí."""
    inicio = time.perf_counter()
    feito = fazer()
    pico = ft.memoria_maxima() / 2**30
    print(f"{nome}: {time.perf_counter() - inicio:.1f} s, pico {pico:.2f} GiB", flush=True)
    return feito


def main() -> None:
    """Imprime os segundos de cada parte e o pico de memória; os tokens são os do modelo da demonstração."""
    ft.acalmar_bibliotecas()
    with tempfile.TemporaryDirectory() as pasta:
        arquivo = Path(pasta) / "grande.jsonl"
        escrever_sorteado(arquivo, int(sys.argv[1]))
        cfg = ft.ler_opcoes(["--demo", "--arquivo-dados", str(arquivo), "--dir-saida", pasta, "--max-exemplos", "0"])
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as outro:  # fora da memória medida
            tokenizer = ft.carregar_tokenizer(outro.submit(ft.preparar_modelo_demo, cfg).result())
        pares, _ = cronometrar("leitura", lambda: ft.ler_dados(cfg))
        print(f"{len(pares)} linhas, {arquivo.stat().st_size / 1e6:.0f} MB")
        exemplos = cronometrar("tokenização", lambda: ft.codificar_dados(cfg, pares, tokenizer))
        cronometrar("a mesma, já guardada", lambda: ft.codificar_dados(cfg, pares, tokenizer))
        linhas = cronometrar("empacotamento", lambda: ft.Linhas(exemplos, cfg))
        print(f"{sum(linhas.tamanhos)} tokens em {len(linhas)} linhas de até {cfg.MAX_TOKENS_POR_LINHA}")
        print(f"{sum(Path(f['filename']).stat().st_size for f in exemplos.cache_files) / 1e6:.0f} MB em disco")
        cronometrar("grupos parecidos", lambda: ft.agrupar_parecidos(pares))


if __name__ == "__main__":
    main()
