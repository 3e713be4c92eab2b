"""A execução inteira na placa desta máquina: python tests/medir_gpu.py [PASTA] [opções do programa].

Um modelo da forma do Phi-3-mini (pesos sorteados, vocabulário real), as constantes do programa e as 2.000 linhas: o
tempo de cada etapa, os tokens por segundo do treino, o pico de memória da placa contra a estimativa, e que parte do
pico de multiplicação em bf16 isso é. Ao lado, se estão instalados, o SFTTrainer do TRL com packing e o unsloth, na
mesma base e nos mesmos exemplos. Imprime tabelas em Markdown. Numa placa pequena, encurte: --num-train-epochs 0.2.
"""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmark import pico_de_matmul
from medir_tamanho_real import executar, preparar

import fine_tuning_saude as ft

PASSOS = 40  # de cada braço de comparação; os dez primeiros ficam fora da conta


class MemoriaDaPlaca:
    """O maior uso da placa, em bytes, visto a cada meio segundo pelo driver."""

    def __enter__(self) -> "MemoriaDaPlaca":
        self.pico, self.fim = 0, threading.Event()
        threading.Thread(target=self.olhar, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.fim.set()

    def olhar(self) -> None:
        """Pergunta ao nvidia-smi até que mandem parar."""
        comando = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not self.fim.wait(0.5):
            with contextlib.suppress(OSError, ValueError):
                dito = subprocess.run(comando, capture_output=True, text=True).stdout
                self.pico = max(self.pico, int(dito.split()[0]) * 2**20)


def medir_treino(saida: Path) -> tuple[float, float]:
    """Tokens por segundo do treino e GiB estimados, do que o diário da execução diz, sem o tempo das validações."""
    from datasets import Dataset

    diario = (saida / "execucao.log").read_text(encoding="utf-8")
    passos = re.findall(r"passo (\d+)/(\d+): loss [^;]*; (\d+):(\d\d):(\d\d)", diario)
    validacoes = sum(map(int, re.findall(r"\(medida em (\d+) s\)", diario)))
    feitos, total, *hora = map(int, passos[-1])
    segundos = 3600 * hora[0] + 60 * hora[1] + hora[2] - validacoes
    dados = Dataset.from_file(str(next((saida / "checkpoints" / "dados").glob("*.arrow"))))
    constantes = json.loads((saida / "execucao.json").read_text(encoding="utf-8"))["constantes"]
    treinados = sum(dados["tokens"][:]) * (1 - constantes["FRACAO_VALIDACAO"]) * constantes["NUM_TRAIN_EPOCHS"]
    estimada = re.search(r"memória do treino, estimada: ([\d.]+) GiB", diario)
    return treinados * feitos / total / segundos, float(estimada[1])


def treinar_outro(qual: str, base: Path, saida: Path) -> float:
    """Tokens por segundo do TRL, ou do unsloth, com packing de MAX_TOKENS_POR_LINHA e recálculo de ativações."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    cfg = ft.ler_opcoes(["--dir-saida", str(saida)])
    if qual == "unsloth":  # que troca partes do transformers e do TRL ao ser importado
        from unsloth import FastLanguageModel
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    tokenizer = ft.carregar_tokenizer(base)
    pares, _ = ft.ler_dados(cfg)
    fim = ft.achar_fim_de_turno(tokenizer)
    textos = [{"text": ft.texto_do_prompt(tokenizer, par.pergunta) + par.resposta + fim} for par in pares]
    alvos = dict(r=cfg.LORA_R, lora_alpha=cfg.LORA_ALPHA)
    if qual == "unsloth":
        modelo, _ = FastLanguageModel.from_pretrained(
            str(base), max_seq_length=cfg.MAX_TOKENS_POR_LINHA, load_in_4bit=True
        )
        modelo, lora = FastLanguageModel.get_peft_model(modelo, **alvos), None
    else:
        from transformers import AutoModelForCausalLM

        quantizacao = ft.etapa_2_quantizacao("cuda")
        modelo = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantizacao, dtype=torch.bfloat16)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **alvos)
    horas: list[float] = []

    class Relogio(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            horas.append(time.perf_counter())

    opcoes = dict(packing=True, max_length=cfg.MAX_TOKENS_POR_LINHA, per_device_train_batch_size=1, bf16=True)
    opcoes |= dict(max_steps=PASSOS, optim=cfg.OPTIM, learning_rate=cfg.LEARNING_RATE, report_to="none")
    opcoes |= dict(save_strategy="no", dataset_text_field="text", eos_token=None, gradient_checkpointing=True)
    argumentos = SFTConfig(output_dir=str(saida / qual), **opcoes)
    trainer = SFTTrainer(
        modelo, argumentos, train_dataset=Dataset.from_list(textos), processing_class=tokenizer, peft_config=lora
    )
    trainer.add_callback(Relogio())
    trainer.train()
    return (PASSOS - 10) * cfg.MAX_TOKENS_POR_LINHA / (horas[-1] - horas[9])


def main() -> None:
    """Mede o programa e, se há, os outros, e imprime as tabelas."""
    if sys.argv[1:2] == ["--outro"]:
        print(json.dumps(treinar_outro(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
        return
    from transformers import AutoConfig

    base, saida, comando = preparar()
    pico = pico_de_matmul(8192, "cuda")
    with MemoriaDaPlaca() as placa:
        etapas = executar(comando, None)
    tokens, estimada = medir_treino(saida)
    print("\n| etapa | tempo | memória do computador |\n|---|---:|---:|")
    for etapa, (segundos, memoria, _) in etapas.items():
        print(f"| {etapa} | {segundos:.0f} s | {memoria / 2**30:.1f} GiB |")
    parte = 4 * ft.estimar_memoria(ft.ler_opcoes([]), AutoConfig.from_pretrained(base), "cuda")[0] * tokens / pico
    memoria = f"{placa.pico / 2**30:.2f} GiB, e estimada {estimada:.2f}"
    print(f"\nmemória da placa: {memoria}; pico de multiplicação: {pico / 1e12:.0f} TFLOP/s")
    print("\n| | tokens/s | parte do pico (4N por token) |\n|---|---:|---:|")
    print(f"| este programa | {tokens:.0f} | {parte:.0%} |")
    for qual in ("trl", "unsloth"):
        if importlib.util.find_spec(qual):
            outro = [sys.executable, __file__, "--outro", qual, str(base), str(saida)]
            dito = subprocess.run(outro, capture_output=True, text=True)
            valor = f"{float(dito.stdout.splitlines()[-1]):.0f}" if dito.returncode == 0 else "falhou"
            print(f"| {qual} | {valor} | |")


if __name__ == "__main__":
    main()
