"""Mede o tempo e a memória do merge num modelo da forma do Phi-3-mini, de pesos sorteados: python tests/medir_merge.py.

Pede 11 GB de memória e 16 GB de disco. Os safetensors são lidos com pread, como o transformers faz no Windows: com o
mmap do Linux, a conta traria também as páginas dos arquivos, que o sistema toma de volta quando precisa.
"""

import logging
import multiprocessing
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from conftest import exemplos_reais

import fine_tuning_saude as ft


def preparar(pasta: Path) -> int:
    """Grava a base e um adaptador de pesos sorteados, e o tokenizer da demonstração; devolve os bytes da base."""
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config

    ft.acalmar_bibliotecas()
    cfg = ft.ler_opcoes(["--demo", "--dir-saida", str(pasta)])
    ft.preparar_modelo_demo(cfg)
    torch.manual_seed(cfg.SEED)
    modelo = AutoModelForCausalLM.from_config(Phi3Config(eos_token_id=2, pad_token_id=0), dtype=torch.bfloat16)
    modelo.save_pretrained(pasta / "base")
    com_lora = ft.etapa_4_lora(cfg, modelo)
    for nome, peso in com_lora.named_parameters():
        if "lora_B" in nome:
            torch.nn.init.normal_(peso, std=0.01)
    com_lora.save_pretrained(pasta / "adaptador_lora")
    return 2 * modelo.num_parameters()


def fundir(pasta: Path) -> tuple[float, int]:
    """Faz a etapa 8 com as constantes do programa; devolve segundos e o pico de memória do processo, em bytes."""
    import transformers.modeling_utils

    como_no_windows: Any = types.SimpleNamespace(**{**vars(sys), "platform": "win32"})
    transformers.modeling_utils.sys = como_no_windows
    ft.acalmar_bibliotecas()
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    ft.log.setLevel(logging.INFO)
    cfg = ft.ler_opcoes(["--dir-saida", str(pasta)])
    tokenizer = ft.carregar_tokenizer(pasta / ft.MODELO_DEMO)
    exemplos = exemplos_reais(pasta / ft.MODELO_DEMO, cfg.EXEMPLOS_PROVA + cfg.EXEMPLOS_IMATRIX)
    for exemplo in exemplos:  # o vocabulário da demonstração é maior que o do modelo medido
        for nome in ("input_ids", "labels"):
            exemplo[nome] = [ft.IGNORADO if n < 0 else n % 32_000 for n in exemplo[nome]]
    provas, amostra = exemplos[: cfg.EXEMPLOS_PROVA], exemplos[cfg.EXEMPLOS_PROVA :]
    inicio = time.perf_counter()
    ft.etapa_8_merge(cfg, pasta / "base", tokenizer, provas, amostra)
    return time.perf_counter() - inicio, ft.memoria_maxima()


def main() -> None:
    """Prepara e funde, cada um num processo só seu, e imprime o que mediu."""
    with tempfile.TemporaryDirectory() as temporaria:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processo:
            em_16_bits = processo.submit(preparar, Path(temporaria)).result()
            segundos, pico = processo.submit(fundir, Path(temporaria)).result()
    vezes = pico / em_16_bits
    print(f"{em_16_bits / 1e9:.2f} GB em 16 bits: {segundos:.0f} s, pico {pico / 1e9:.2f} GB, {vezes:.2f} vezes")


if __name__ == "__main__":
    main()
