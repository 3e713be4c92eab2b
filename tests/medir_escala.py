"""Mede o portão dos dados em um arquivo grande: python tests/medir_escala.py 200000."""

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    """Imprime linhas, tamanho, segundos de leitura e de agrupamento, e o pico de memória do processo (Linux: KiB)."""
    with tempfile.TemporaryDirectory() as pasta:
        arquivo = Path(pasta) / "grande.jsonl"
        escrever_sorteado(arquivo, int(sys.argv[1]))
        inicio = time.perf_counter()
        pares, _ = ft.ler_dados(ft.ler_opcoes(["--arquivo-dados", str(arquivo)]))
        lido = time.perf_counter()
        ft.agrupar_parecidos(pares)
        fim = time.perf_counter()
        pico = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        tamanho = arquivo.stat().st_size / 1e6
        print(f"{len(pares)} linhas, {tamanho:.0f} MB: {pico:.2f} GiB")
        print(f"leitura {lido - inicio:.1f} s, grupos {fim - lido:.1f} s")


if __name__ == "__main__":
    main()
