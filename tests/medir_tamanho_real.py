"""O ensaio no tamanho real, na CPU: python tests/medir_tamanho_real.py [PASTA] [opções do programa].

Monta um modelo da forma do Phi-3-mini (3,8 bilhões de pesos sorteados, o vocabulário real, janela de 2.047), executa o
programa pelas nove etapas com as constantes dele, menos as que encurtam o treino, para-o uma vez no treino e uma na
etapa 9, continua, e imprime por etapa o tempo, o pico de memória e os bytes escritos; a memória que o programa
estimou está no que ele diz na etapa 1. Pede 24 GB de memória, 45 GB de
disco e mais de uma hora em 2 núcleos livres.
"""

import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import psutil
from conftest import PROGRAMA, RAIZ
from modelos import construir_phi3

import fine_tuning_saude as ft

# cem exemplos: 32 na validação e 68 no treino, mais que os da prova e os da importance matrix; três passos
OPCOES = ["--treinar-na-cpu", "--max-exemplos", "100", "--fracao-validacao", "0.32", "--max-tokens-por-linha", "1024"]
OPCOES += ["--num-train-epochs", "0.15", "--save-steps", "1", "--logging-steps", "1"]
PARADAS = (r"passo 2/\d+: loss", r"base quantizado em")  # o que o programa diz quando se para


def montar_base(pasta: Path) -> Path:
    """A base: tokenizer do Phi-3 minúsculo dos testes, e config e pesos do tamanho real."""
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    with tempfile.TemporaryDirectory() as temporaria:
        with tarfile.open(ft.buscar_pacote(ft.SDIST_LLAMA_CPP, Path(temporaria))) as tar:
            membro = next(m for m in tar if m.name.endswith("/ggml-vocab-phi-3.gguf"))
            membro.name = "vocabulario.gguf"
            tar.extract(membro, temporaria, filter="data")
        construir_phi3(pasta, Path(temporaria) / "vocabulario.gguf")
    for pequeno in pasta.glob("*.safetensors"):
        pequeno.unlink()
    torch.manual_seed(0)
    config = Phi3Config(
        bos_token_id=1, eos_token_id=32000, pad_token_id=32000, sliding_window=2047, dtype=torch.bfloat16
    )
    torch.set_default_dtype(torch.bfloat16)
    modelo = Phi3ForCausalLM(config)
    # como num modelo treinado, cada bloco soma pouco ao lado do que já vinha: embeddings grandes, e as projeções
    # de saída divididas pela raiz do número delas, como no GPT-2. Sem isto, um modelo sorteado deste tamanho amplifica
    # cada erro de arredondamento, e nenhuma quantização de 4 bits fica perto dele (KL 0,34)
    with torch.no_grad():
        modelo.get_input_embeddings().weight *= 50
        for nome, peso in modelo.named_parameters():
            if nome.endswith(("o_proj.weight", "down_proj.weight")):
                peso /= (2 * config.num_hidden_layers) ** 0.5
    modelo.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[32000, 32007], pad_token_id=32000)
    modelo.save_pretrained(pasta, max_shard_size="1GB")
    return pasta


def memoria_propria(processo: psutil.Process) -> int:
    """Bytes que o processo ocupa agora, sem as páginas de arquivos."""
    memoria = processo.memory_info()
    return memoria.rss - memoria.shared


class Medida:
    """Tempo, memória e bytes escritos de cada etapa de uma execução, lidos de fora dela."""

    def __init__(self, processo: subprocess.Popen) -> None:
        self.etapa, self.inicio, self.etapas = "", time.monotonic(), {}
        self.raiz, self.escritos, self.antes, self.pico = psutil.Process(processo.pid), {}, 0, 0
        self.fim = threading.Event()
        (fio := threading.Thread(target=self.amostrar, daemon=True)).start()
        self.fio = fio

    def amostrar(self) -> None:
        """A cada dois segundos, a memória do programa e dos filhos, sem as páginas de arquivos, e o que escreveram."""
        while not self.fim.wait(2):
            soma = 0
            for processo in [self.raiz, *self.filhos()]:
                try:
                    soma += memoria_propria(processo)
                    self.escritos[processo.pid] = processo.io_counters().write_bytes
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue
            self.pico = max(self.pico, soma)

    def filhos(self) -> list[psutil.Process]:
        """Os processos que o programa abriu e ainda vivem."""
        try:
            return self.raiz.children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def entrar(self, etapa: str) -> None:
        """Fecha a etapa em andamento e começa outra."""
        agora, escrito = time.monotonic(), sum(self.escritos.values())
        if self.etapa:
            self.etapas[self.etapa] = (agora - self.inicio, self.pico, escrito - self.antes)
        self.etapa, self.inicio, self.antes, self.pico = etapa, agora, escrito, 0


def executar(comando: list[str], parar_em: str | None) -> dict[str, tuple[float, int, int]]:
    """Executa até o fim ou até que o programa diga `parar_em`; {etapa: (segundos, memória, bytes escritos)}."""
    ambiente = {**os.environ, "PYTHONUNBUFFERED": "1"}
    del ambiente["OMP_WAIT_POLICY"]  # a dos testes; o programa espera como o OpenMP espera
    processo = subprocess.Popen(comando, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ambiente)
    medida, parado = Medida(processo), False
    for linha in processo.stdout:
        print(f"{time.strftime('%H:%M:%S')} {linha}", end="", flush=True)
        if achado := re.match(r"\[(\d)/9\]", linha):
            medida.entrar(achado[1])
        if parar_em and not parado and re.search(parar_em, linha):
            processo.send_signal(signal.SIGKILL)  # como uma queda de luz
            parado = True
    medida.entrar("")
    medida.fim.set()
    medida.fio.join()
    assert processo.wait() == (-signal.SIGKILL if parado else 0), "o programa falhou"
    return medida.etapas


def preparar(*opcoes: str) -> tuple[Path, Path, list[str]]:
    """A base, montada se falta, a pasta de saída e o comando, com `opcoes` e as da linha: [PASTA] [opções]."""
    pasta, resto = tempfile.mkdtemp(), sys.argv[1:]
    if resto and not resto[0].startswith("-"):
        pasta, *resto = resto
    base, saida = Path(pasta) / "Phi-3-mini-sorteado", Path(pasta) / "saida"
    if not (base / "model.safetensors.index.json").is_file():
        montar_base(base)
    comando = [sys.executable, str(PROGRAMA), "--modelo-base", str(base), "--dir-saida", str(saida)]
    return base, saida, [*comando, "--dir-llama-cpp", str(RAIZ / "llama.cpp"), *opcoes, *resto]


def main() -> None:
    """Monta, executa três vezes e imprime a tabela."""
    *_, comando = preparar(*OPCOES)
    # a primeira recalcula as ativações de todas as camadas, para medir também essa memória
    vezes = {
        "até a parada no treino": ([*comando, "--gradient-checkpointing", "sim"], PARADAS[0]),
        "até a parada na etapa 9": (comando, PARADAS[1]),
        "até o fim": (comando, None),
    }
    tabela = "| execução | etapa | tempo | pico de memória | escrito |\n|---|---|---:|---:|---:|"
    for nome, (linha, parar_em) in vezes.items():
        for etapa, (segundos, memoria, escrito) in executar(linha, parar_em).items():
            if segundos >= 5:
                celulas = f"{segundos:.0f} s | {memoria / 2**30:.1f} GiB | {escrito / 1e9:.1f} GB"
                tabela += f"\n| {nome} | {etapa} | {celulas} |"
        print(f"\n{tabela}\n", flush=True)


if __name__ == "__main__":
    main()
