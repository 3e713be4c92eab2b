"""A memória estimada e a que o treino ocupa, no modelo da demonstração, na CPU: tests/medir_memoria.py.

Treina algumas linhas cheias e compara a estimativa com o pico dos tensores, que o profiler do PyTorch conta, e com o do
processo, que também traz o que o alocador do sistema não devolve.
"""

import sys
import tempfile
import threading

import psutil
import torch
from conftest import DADOS, preparar
from medir_tamanho_real import memoria_propria

import fine_tuning_saude as ft

ESTE = psutil.Process()


class Pico(threading.Thread):
    """A maior `memoria_propria` deste processo, vista a cada centésimo de segundo."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.valor, self.fim = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.fim.wait(0.01):
            self.valor = max(self.valor, memoria_propria(ESTE))


def pico_de_tensores(perfil: torch.profiler.profile) -> int:
    """O maior total, em bytes, do que o PyTorch alocou e ainda não soltou desde que o perfil começou."""
    total = maior = 0
    for evento in sorted(perfil.profiler.kineto_results.events(), key=lambda evento: evento.start_ns()):
        if evento.name() == "[memory]":
            total += evento.nbytes()
            maior = max(maior, total)
    return maior


def main() -> None:
    """Mede e imprime a tabela."""
    from transformers import AutoConfig

    ft.acalmar_bibliotecas()
    with tempfile.TemporaryDirectory() as pasta:
        cfg = ft.ler_opcoes(["--demo", "--dir-saida", pasta, "--arquivo-dados", str(DADOS), *sys.argv[1:]])
        base = ft.preparar_modelo_demo(cfg)
        pares = ft.ler_dados(cfg)[0][:100]
        estimada = ft.estimar_memoria(cfg, AutoConfig.from_pretrained(base), "cpu")[-1][0]
        pacotes = memoria_propria(ESTE)
        tokenizer, modelo = ft.etapa_3_modelo(preparar(base), ft.etapa_2_quantizacao("cpu"))
        modelo = ft.etapa_4_lora(cfg, modelo).train()
        modelo.config.use_cache = False
        linhas = ft.Linhas(ft.etapa_5_dados(cfg, pares, tokenizer)[0], cfg)
        pesos = sum(peso.nbytes for peso in modelo.parameters())
        adaptadores = sum(peso.nbytes for peso in modelo.parameters() if peso.requires_grad)

        def treinar(i: int) -> None:
            lote = ft.juntar_exemplos(linhas[i])
            with torch.autocast("cpu", torch.bfloat16, enabled=modelo.dtype == torch.bfloat16):
                modelo(**lote, num_items_in_batch=lote["labels"].numel()).loss.backward()

        with ft.perda_em_pedacos(modelo.get_base_model()):
            pico = Pico()
            for i in range(4):
                treinar(i)
            pico.fim.set()
            modelo.zero_grad()
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            ) as perfil:
                treinar(4)
        # os dois momentos do otimizador, que aqui não se criou
        tensores = pesos + pico_de_tensores(perfil) + 2 * adaptadores
    print("| cálculo | estimada | tensores | processo, menos os pacotes |\n|---|---:|---:|---:|")
    do_processo = pico.valor - pacotes + 2 * adaptadores
    colunas = [f"{valor / 2**30:.2f} GiB" for valor in (estimada, tensores, do_processo)]
    print(f"| {modelo.dtype} | {' | '.join(colunas)} |".replace("torch.", "").replace(".", ","))


if __name__ == "__main__":
    main()
