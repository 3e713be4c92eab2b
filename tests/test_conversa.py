"""A conversa no terminal com o GGUF que a execução entregou."""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RAIZ, SEM_REDE, executar

import fine_tuning_saude as ft


@pytest.fixture(scope="module")
def sem_rede(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """O ambiente em que toda tentativa de usar a rede é recusada e fica escrita."""
    pasta = tmp_path_factory.mktemp("sem_rede")
    (pasta / "sitecustomize.py").write_text(SEM_REDE)
    return {**os.environ, "PYTHONPATH": str(pasta), "TENTATIVAS_DE_REDE": str(pasta / "tentativas.txt")}


# o modelo minúsculo escreve tudo antes que se possa interrompê-lo: cada token espera um pouco
# e quem é iniciado em segundo plano herda o Ctrl-C ignorado, que num terminal vale
DEVAGAR = f"""
import signal, sys, time, llama_cpp
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(RAIZ)!r})
import fine_tuning_saude as ft
avaliar = llama_cpp.Llama.eval
llama_cpp.Llama.eval = lambda modelo, tokens: (time.sleep(0.02), avaliar(modelo, tokens))[1]
sys.exit(ft.main(sys.argv[1:]))
"""


class Terminal:
    """O programa num terminal de mentira, com o que ele já escreveu."""

    def __init__(self, ambiente: dict[str, str], *opcoes: object) -> None:
        self.mestre, escravo = pty.openpty()
        comando = [sys.executable, "-c", DEVAGAR, *map(str, opcoes)]
        abertos = dict(stdin=escravo, stdout=escravo, stderr=escravo)
        self.processo = subprocess.Popen(
            comando, cwd=RAIZ, env={**ambiente, "TERM": "xterm"}, start_new_session=True, **abertos
        )
        os.close(escravo)
        self.dito = ""

    def ler_ate(self, texto: str, vezes: int = 1) -> None:
        """Lê até que `texto` tenha aparecido `vezes` vezes."""
        prazo = time.monotonic() + 60
        while self.dito.count(texto) < vezes:
            assert time.monotonic() < prazo, f"não apareceu {texto!r}:\n{self.dito}"
            if select.select([self.mestre], [], [], 0.1)[0]:
                self.dito += os.read(self.mestre, 65536).decode(errors="replace")

    def ler_mais(self, letras: int) -> None:
        """Lê até que tenham aparecido mais `letras` letras."""
        inicio = len(self.dito)
        while len(self.dito) < inicio + letras:
            assert select.select([self.mestre], [], [], 60)[0], f"parou de escrever:\n{self.dito}"
            self.dito += os.read(self.mestre, 64).decode(errors="replace")

    def escrever(self, texto: str) -> None:
        """Digita uma linha."""
        os.write(self.mestre, f"{texto}\n".encode())


def test_a_conversa_mostra_o_aviso_responde_para_no_ctrl_c_e_sai(
    execucao_phi3: tuple[Path, dict], sem_rede: dict[str, str]
) -> None:
    saida = execucao_phi3[0]
    antes = {a: a.stat().st_mtime_ns for a in saida.rglob("*")}
    terminal = Terminal(sem_rede, "--conversar", "--dir-saida", saida)
    terminal.ler_ate("\n> ")
    assert terminal.dito.lstrip().startswith("Não substitui protocolos nem profissionais")
    terminal.escrever("quem toma a vacina da gripe?")
    terminal.ler_ate("gripe?")
    terminal.ler_mais(20)  # as palavras vêm aos poucos, e não no fim
    os.kill(terminal.processo.pid, signal.SIGINT)
    terminal.ler_ate("(interrompida)")
    terminal.ler_ate("\n> ", 2)
    terminal.escrever("e <|end|> agora?")
    terminal.ler_ate("A pergunta traz um token de controle do modelo.")
    terminal.ler_ate("\n> ", 3)
    terminal.escrever("o que é UBS?")  # o programa continua, e responde
    terminal.ler_mais(len("o que é UBS?") + 20)
    os.kill(terminal.processo.pid, signal.SIGINT)
    terminal.ler_ate("\n> ", 4)
    terminal.escrever("\x1b[200~Duas perguntas:\n1. O que é APS?\n2. O que é UBS?\x1b[201~")  # como se cola
    terminal.ler_ate("\x1b[?2004l", 4)  # a quarta linha enviada: o programa pede ao terminal que marque o que se cola
    terminal.ler_mais(20)
    os.kill(terminal.processo.pid, signal.SIGINT)
    terminal.ler_ate("\n> ", 5)
    terminal.escrever("/sair")
    with contextlib.suppress(OSError):  # até que o terminal se feche
        terminal.ler_mais(1_000_000)
    assert terminal.processo.wait(20) == 0
    assert terminal.dito.count("\n> ") == 5, "o texto colado é uma pergunta só"
    assert {a: a.stat().st_mtime_ns for a in saida.rglob("*")} == antes, "não escreve arquivo nenhum"
    assert not Path(sem_rede["TENTATIVAS_DE_REDE"]).exists(), "não usa a rede"
    assert "Traceback" not in terminal.dito


def test_perguntar_escreve_so_a_resposta_a_mesma_do_llama_cpp_e_acaba(execucao_phi3: tuple[Path, dict]) -> None:
    import llama_cpp

    saida, registro = execucao_phi3
    feito = executar("--perguntar", "O que é APS?", "--dir-saida", saida)
    assert feito.returncode == 0 and "SAMU 192" in feito.stderr, feito.stderr
    maximo = registro["constantes"]["MAX_LENGTH"]
    modelo = llama_cpp.Llama(str(saida / registro["gguf"][-1]["arquivo"]), n_ctx=2 * maximo, verbose=False)
    conversa = [{"role": "user", "content": "O que é APS?"}]
    esperada = modelo.create_chat_completion(conversa, temperature=0.0, max_tokens=maximo)["choices"][0]
    modelo.close()
    assert feito.stdout == esperada["message"]["content"] + "\n"
    # a que não acabou sozinha é dita cortada
    assert ("foi cortada em" in feito.stderr) == (esperada["finish_reason"] == "length")
    # e /sair, fora da conversa, é uma pergunta como outra
    assert executar("--perguntar", "/sair", "--dir-saida", saida).stdout.strip()


def test_sem_modelo_pronto_ou_com_pergunta_que_nao_cabe_diz_o_que_fazer(
    execucao_phi3: tuple[Path, dict], tmp_path: Path
) -> None:
    feito = executar("--conversar", "--dir-saida", tmp_path)
    assert feito.returncode == 2 and "não tem um modelo pronto: treine antes" in feito.stderr
    for pergunta, motivo in {"": "está vazia", "palavra " * 2000: "passa de 256 tokens"}.items():
        feito = executar("--perguntar", pergunta, "--dir-saida", execucao_phi3[0])
        assert feito.returncode == 2 and f"ERRO: a pergunta {motivo}." in feito.stderr
        assert "Traceback" not in feito.stderr and not feito.stdout


def test_o_historico_que_ja_nao_cabe_no_contexto_e_esquecido_do_mais_antigo(
    execucao_phi3: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pedidos = []
    original = ft.escritor_de_prompts

    def anotar(modelo: object) -> Callable[[list[dict[str, str]]], tuple[str, list[int]]]:
        escrever = original(modelo)

        def anotado(falas: list[dict[str, str]]) -> tuple[str, list[int]]:
            pedidos.append([fala["content"] for fala in falas])
            return escrever(falas)

        return anotado

    ditas = [f"pergunta {i} " + "longa " * 60 for i in range(4)]
    monkeypatch.setattr(ft, "escritor_de_prompts", anotar)
    conversar_com(ditas, execucao_phi3[0], monkeypatch)
    assert len(pedidos[-1]) < 7 and pedidos[-1][-1].startswith("pergunta 3"), "a última fica, as primeiras saem"
    assert not any("pergunta 0" in fala for fala in pedidos[-1])
    # a que se recusa não faz esquecer nada
    pedidos.clear()
    curta = [{"choices": [{"text": "sim", "finish_reason": "stop"}]}]
    monkeypatch.setattr("llama_cpp.Llama.create_completion", lambda *_, **__: curta)
    conversar_com(["a primeira", "palavra " * 2000, "", "<|end|>", "a segunda"], execucao_phi3[0], monkeypatch)
    assert pedidos[-1] == ["a primeira", "sim", "a segunda"]
    dito = capsys.readouterr().err
    assert all(motivo in dito for motivo in ("passa de 256 tokens", "está vazia", "token de controle"))


def conversar_com(ditas: list[str], saida: Path, monkeypatch: pytest.MonkeyPatch, codificacao: str = "utf-8") -> None:
    """Conversa neste processo, com as linhas `ditas` na entrada."""
    entrada = io.BytesIO("\n".join([*ditas, "/sair"]).encode(codificacao))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(entrada, encoding="utf-8"))
    ft.conversar(ft.ler_opcoes(["--conversar", "--dir-saida", str(saida)]))


def test_o_que_nao_vem_na_codificacao_do_terminal_nao_derruba_a_conversa(
    execucao_phi3: tuple[Path, dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    conversar_com(["o que é saúde?"], execucao_phi3[0], monkeypatch, codificacao="latin-1")
    feito = executar("--perguntar", "o que \udce9 APS?", "--dir-saida", execucao_phi3[0])
    assert feito.returncode == 0 and feito.stdout.strip(), feito.stderr


def test_gguf_estragado_e_dito_sem_traceback(execucao_phi3: tuple[Path, dict], tmp_path: Path) -> None:
    saida, registro = execucao_phi3
    for nome in ("execucao.json", registro["gguf"][-1]["arquivo"]):
        (tmp_path / nome).write_bytes((saida / nome).read_bytes())
    (tmp_path / registro["gguf"][-1]["arquivo"]).write_bytes(b"GGUF e mais nada")
    feito = executar("--perguntar", "O que é APS?", "--dir-saida", tmp_path)
    assert feito.returncode == 1 and "o llama.cpp não abre" in feito.stderr and "Traceback" not in feito.stderr


def test_as_respostas_geradas_juntas_sao_as_de_uma_por_vez(execucao_phi3: tuple[Path, dict]) -> None:
    import llama_cpp
    from conftest import linhas_reais

    saida, registro = execucao_phi3
    modelo = llama_cpp.Llama(str(saida / registro["gguf"][0]["arquivo"]), n_ctx=1024, verbose=False)
    perguntas = [linha["input"] for linha in linhas_reais(11)]  # mais que as que vão juntas de cada vez
    escrever = ft.escritor_de_prompts(modelo)
    prompts = [escrever([{"role": "user", "content": pergunta}])[1] for pergunta in perguntas]
    juntas = list(ft.responder_juntas(modelo, prompts, 12))
    assert len(juntas) == 11
    for prompt, (ids, terminou) in zip(prompts, juntas, strict=True):
        sozinha = modelo.create_completion(prompt, max_tokens=12, temperature=0.0)["choices"][0]
        assert modelo.detokenize(ids).decode(errors="replace") == sozinha["text"]
        assert terminou == (sozinha["finish_reason"] == "stop")
    modelo.close()
