"""Compara, na mesma máquina e com os mesmos dados, três modos de treinar o modelo da demonstração.

    python -m pip install trl==1.16.0 && python tests/benchmark.py --exemplos 60

(a) a receita ingênua: cada exemplo preenchido até 512, um por vez e quatro por passo, com gradient checkpointing e
perda em todos os tokens; (b) o `SFTTrainer` do TRL em seu melhor ajuste conhecido: packing de 1.024 tokens, perda só na
resposta, bf16; (c) este programa. Mesmo modelo em NF4, mesmo LoRA, mesma taxa, mesma passagem única. Cada um corre num
processo próprio, na ordem a b c, c b a, a b c; o primeiro passo fica fora da conta; só tokens reais contam, nunca o
preenchimento. O pico é o maior produto de matrizes em bf16, medido no mesmo processo logo antes.

    python tests/benchmark.py --processos --exemplos 120

Este programa em um processo de um fio, duas linhas por passo, e em dois processos de um fio, uma linha de cada um; a
memória é a de cada processo.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conftest import DADOS, DOIS
from conftest import preparar as preparar_etapas

import fine_tuning_saude as ft

BRACOS = {"ingênua": "receita ingênua", "trl": "TRL SFTTrainer", "nosso": "este programa"}
PROCESSOS = {"um": "um processo de um fio", "dois": "dois processos de um fio"}


def pico_de_matmul(lado: int = 2048, dispositivo: str = "cpu") -> float:
    """FLOP por segundo do produto de duas matrizes bf16 desse lado, o melhor de seis."""
    import torch

    a, b = torch.randn(2, lado, lado, dtype=torch.bfloat16, device=dispositivo)
    esperar = torch.cuda.synchronize if dispositivo == "cuda" else lambda: None
    melhor = float("inf")
    for _ in range(6):
        esperar()
        inicio = time.perf_counter()
        for _ in range(5):
            a @ b
        esperar()
        melhor = min(melhor, (time.perf_counter() - inicio) / 5)
    return 2 * lado**3 / melhor


class Relogio:
    """Conta tokens reais e de resposta por lote e anota a hora do fim de cada passo, sem contar o primeiro."""

    def __init__(self) -> None:
        self.tokens, self.respostas, self.horas = [], [], []

    def contar(self, juntar: Any, reais: Any) -> Any:
        """Devolve `juntar` de modo que cada lote passe por `reais(lote)` → (tokens, tokens de resposta)."""

        def contado(exemplos: Any) -> Any:
            lote = juntar(exemplos)
            self.anotar(*reais(lote))
            return lote

        return contado

    def anotar(self, tokens: Any, respostas: Any) -> None:
        """Soma à conta um lote com tantos tokens reais e de resposta."""
        self.tokens.append(int(tokens))
        self.respostas.append(int(respostas))

    def callback(self) -> Any:
        """O callback que anota as horas."""
        from transformers import TrainerCallback

        class Anotar(TrainerCallback):
            def on_step_end(_, *args: Any, **opcoes: Any) -> None:
                self.horas.append(time.perf_counter())

        return Anotar()

    def medidas(self, lotes_por_passo: int) -> dict[str, float]:
        """Tokens por segundo do segundo passo ao último."""
        segundos = self.horas[-1] - self.horas[0]
        fim = len(self.horas) * lotes_por_passo
        conta = {"tokens": self.tokens, "respostas": self.respostas}
        return {f"{nome}_s": sum(n[lotes_por_passo:fim]) / segundos for nome, n in conta.items()}


def preparar(cfg: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Pasta do modelo base, tokenizer, treino e validação da demonstração."""
    base = ft.preparar_modelo_demo(cfg)
    tokenizer = ft.carregar_tokenizer(base)
    pares = sorted(ft.ler_dados(cfg)[0], key=lambda par: par[1:3])  # os mesmos que a etapa 1 sorteia
    pares = random.Random(cfg.SEED).sample(pares, cfg.MAX_EXEMPLOS)
    treino, validacao = ft.etapa_5_dados(cfg, pares, tokenizer)
    return base, tokenizer, treino, validacao


def em_4_bits(base: Path) -> Any:
    """O modelo como os guias de QLoRA o carregam."""
    from transformers import AutoModelForCausalLM

    quantizacao = ft.etapa_2_quantizacao("cpu")
    tipo = quantizacao.bnb_4bit_compute_dtype
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=quantizacao, dtype=tipo, device_map="cpu")


def treinar_ingenua(cfg: argparse.Namespace, relogio: Relogio) -> tuple[Any, dict[str, float], Any]:
    """(a): preenchimento até 512, lote 1 × 4, checkpointing, perda em tudo, base em fp32 fora dos 4 bits."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import Trainer, TrainingArguments

    base, tokenizer, treino, validacao = preparar(cfg)
    modelo = prepare_model_for_kbit_training(em_4_bits(base), use_gradient_checkpointing=True)
    lora = LoraConfig(task_type="CAUSAL_LM", r=cfg.LORA_R, lora_alpha=cfg.LORA_ALPHA, target_modules="all-linear")
    modelo = get_peft_model(modelo, lora)

    def preencher(exemplos: list[dict[str, Any]]) -> dict[str, Any]:
        (exemplo,) = exemplos
        ids = torch.full((1, 512), tokenizer.pad_token_id)
        ids[0, : len(exemplo["input_ids"])] = torch.tensor(exemplo["input_ids"])
        real = torch.arange(512)[None] < len(exemplo["input_ids"])
        relogio.anotar(real.sum(), sum(rotulo != ft.IGNORADO for rotulo in exemplo["labels"]))
        return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~real, ft.IGNORADO)}

    opcoes = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, bf16=True, remove_unused_columns=False)
    argumentos = TrainingArguments(**opcoes, **comuns(cfg), activation_checkpointing=True)
    trainer = Trainer(modelo, argumentos, preencher, treino, callbacks=[relogio.callback()])
    trainer.train()
    return modelo, relogio.medidas(4), validacao


def treinar_trl(cfg: argparse.Namespace, relogio: Relogio) -> tuple[Any, dict[str, float], Any]:
    """(b): packing de 1.024, perda só na resposta, bf16, sem checkpointing."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    base, tokenizer, treino, validacao = preparar(cfg)
    fim = ft.achar_fim_de_turno(tokenizer)
    textos = [
        {"prompt": ft.texto_do_prompt(tokenizer, e["pergunta"]), "completion": e["resposta"] + fim} for e in treino
    ]
    from datasets import Dataset

    lora = LoraConfig(task_type="CAUSAL_LM", r=cfg.LORA_R, lora_alpha=cfg.LORA_ALPHA, target_modules="all-linear")
    opcoes = dict(per_device_train_batch_size=1, packing=True, max_length=1024, bf16=True, completion_only_loss=True)
    opcoes |= dict(gradient_checkpointing=False, eos_token=None, dataset_num_proc=None)
    argumentos = SFTConfig(**opcoes, **comuns(cfg))
    trainer = SFTTrainer(
        em_4_bits(base),
        argumentos,
        train_dataset=Dataset.from_list(textos),
        processing_class=tokenizer,
        peft_config=lora,
    )
    trainer.add_callback(relogio.callback())
    trainer.data_collator = relogio.contar(
        trainer.data_collator, lambda lote: (lote["input_ids"].numel(), (lote["labels"] != ft.IGNORADO).sum())
    )
    trainer.train()
    return trainer.model, relogio.medidas(1), validacao


def treinar_nosso(cfg: argparse.Namespace, relogio: Relogio) -> tuple[Any, dict[str, float], Any]:
    """(c): a etapa 7 do programa, com o relógio por fora."""
    import transformers

    base, _, treino, validacao = preparar(cfg)
    quantizacao = ft.etapa_2_quantizacao("cpu")
    modelo = ft.etapa_4_lora(cfg, ft.etapa_3_modelo(preparar_etapas(base), quantizacao)[1])
    original = transformers.Trainer.__init__
    shutil.rmtree(Path(cfg.DIR_SAIDA) / "checkpoints", ignore_errors=True)  # senão continuaria do braço anterior

    def com_relogio(trainer: Any, *args: Any, callbacks: list[Any], data_collator: Any, **opcoes: Any) -> None:
        def contar(lote: dict[str, Any]) -> tuple[int, int]:
            return (lote["input_ids"].numel(), lote["labels"].numel()) if modelo.training else (0, 0)

        contado = relogio.contar(data_collator, contar)
        original(trainer, *args, callbacks=[*callbacks, relogio.callback()], data_collator=contado, **opcoes)
        # a validação é medida depois, igual para os três
        trainer.evaluate = lambda *a, **o: trainer.log(medida := {"eval_perda": 0.0}) or medida

    transformers.Trainer.__init__ = com_relogio
    argumentos = ft.etapa_6_argumentos(cfg, preparar_etapas(base), quantizacao)
    ft.etapa_7_treinamento(cfg, modelo, treino, validacao, argumentos)
    return modelo, relogio.medidas(cfg.GRADIENT_ACCUMULATION_STEPS), validacao


def comuns(cfg: argparse.Namespace) -> dict[str, Any]:
    """Os argumentos que os três dividem."""
    return dict(
        output_dir=str(Path(cfg.DIR_SAIDA) / "checkpoints"),
        num_train_epochs=cfg.NUM_TRAIN_EPOCHS,
        learning_rate=cfg.LEARNING_RATE,
        lr_scheduler_type=cfg.LR_SCHEDULER_TYPE,
        warmup_steps=cfg.WARMUP_STEPS,
        optim=cfg.OPTIM,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=cfg.SEED,
    )


def correr(braco: str, opcoes: list[str]) -> dict[str, float]:
    """Treina um braço neste processo e mede tudo."""
    ft.acalmar_bibliotecas()
    cfg = ft.ler_opcoes(["--demo", *opcoes])
    pico = pico_de_matmul()
    treinar = {"ingênua": treinar_ingenua, "trl": treinar_trl}.get(braco, treinar_nosso)
    if braco == "dois":
        ft.juntar_processos()
    modelo, medidas, validacao = treinar(cfg, Relogio())
    if braco == "dois":
        import torch.distributed as dist

        dist.all_gather_object(todas := [None, None], medidas)
        medidas, pico = {nome: sum(medida[nome] for medida in todas) for nome in medidas}, 2 * pico
    medidas["memoria"] = ft.memoria_maxima()
    exemplos = validacao.to_list()
    provas = [ft.comparar_logprobs(p, p, e) for p, e in zip(ft.logprobs(modelo, exemplos), exemplos, strict=True)]
    parte = 4 * contar_parametros(cfg) * medidas["tokens_s"] / pico
    return medidas | {"perda": ft.juntar_medidas(provas)["nll"], "parte_do_pico": parte, "pico": pico}


def contar_parametros(cfg: argparse.Namespace) -> int:
    """Parâmetros da base, pela configuração: o modelo em NF4 guarda dois pesos por byte e contaria a menos."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        modelo = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(ft.preparar_modelo_demo(cfg)))
    return sum(peso.numel() for peso in modelo.parameters())


def main() -> None:
    """Corre os três braços alternados e imprime a tabela em Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--exemplos", type=int, default=60, help="exemplos de treino e validação, sorteados")
    parser.add_argument("--voltas", type=int, default=3, help="vezes que cada um corre; a tabela traz as medianas")
    parser.add_argument("--processos", action="store_true", help="um processo de um fio contra dois")
    parser.add_argument("--braco", choices=BRACOS | PROCESSOS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    saida = Path(tempfile.gettempdir()) / "benchmark-aps"
    opcoes = ["--dir-saida", str(saida), "--max-exemplos", str(args.exemplos), "--fracao-validacao", "0.2"]
    opcoes += ["--arquivo-dados", str(DADOS)]
    if args.braco:
        opcoes += ["--gradient-accumulation-steps", "2"] if args.braco == "um" else []
        medida = correr(args.braco, opcoes)
        if ft.processo_e_total()[0] == 0:
            print(json.dumps(medida))
        return
    bracos = PROCESSOS if args.processos else BRACOS
    ambiente = {**os.environ, "PYTHONWARNINGS": "ignore"} | ({"OMP_NUM_THREADS": "1"} if args.processos else {})
    medidas: dict[str, list[dict[str, float]]] = {braco: [] for braco in bracos}
    for braco in itertools.chain(*([*bracos][:: 1 - 2 * (volta % 2)] for volta in range(args.voltas))):
        comando = [*(DOIS if braco == "dois" else [sys.executable]), __file__, "--braco", braco]
        comando += ["--exemplos", str(args.exemplos)]
        feito = subprocess.run(comando, capture_output=True, text=True, env=ambiente)
        if feito.returncode:
            sys.exit(f"{braco}: {feito.stderr[-3000:]}")
        medidas[braco].append(json.loads(feito.stdout.splitlines()[-1]))
        print(braco, medidas[braco][-1], file=sys.stderr, flush=True)
    print("| | tokens reais/s | tokens de resposta/s | memória | perda na validação | parte do pico de matmul |")
    print("|---|---:|---:|---:|---:|---:|")
    for braco, nome in bracos.items():
        m = {campo: statistics.median(volta[campo] for volta in medidas[braco]) for campo in medidas[braco][0]}
        voltas = ", ".join(f"{volta['tokens_s']:.0f}" for volta in medidas[braco])
        print(
            f"| {nome} | {m['tokens_s']:.0f} ({voltas}) | {m['respostas_s']:.0f} | {m['memoria'] / 2**30:.2f} GiB "
            f"| {ft.com_virgula(m['perda'])} | {100 * m['parte_do_pico']:.0f} % |"
        )


if __name__ == "__main__":
    main()
