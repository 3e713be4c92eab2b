"""Um Python que já nasce com os pacotes pesados importados: cada execução do programa nos testes paga milissegundos.

Um servidor importa tudo uma vez e, a cada pedido, bifurca-se (`os.fork`): o filho troca argumentos, pasta, ambiente e
arquivos abertos pelos do pedido e executa `-c`, `-m` ou um arquivo, como o Python faria. `executavel()` devolve um
executável que faz esse pedido, e que no filho é o `sys.executable`: também o conversor e os processos da prova nascem
dele. O que se quer provar com um processo de verdade (o tempo dos imports, variáveis que as bibliotecas leem ao ser
importadas, um sitecustomize, a demonstração) usa o Python comum.
"""

import atexit
import contextlib
import fcntl
import functools
import itertools
import json
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

# o que o servidor importa. O gguf não: o conversor usa o da pasta dele, e não o instalado
PESADOS = "torch torch.distributed numpy peft accelerate datasets bitsandbytes sentencepiece safetensors.torch"
PESADOS += " llama_cpp llama_cpp.llama_chat_format psutil rensa validate_docbr phonenumbers sacrebleu matplotlib.figure"
PESADOS += " matplotlib.backends.backend_agg filelock multiprocessing.spawn concurrent.futures.process"
PESADOS += " multiprocessing.resource_tracker huggingface_hub.repocard transformers.trainer transformers.models.phi3"
PESADOS += " transformers.models.phi3.modeling_phi3 transformers.models.llama.modeling_llama transformers.models.auto"
PESADOS += " transformers.models.qwen2.modeling_qwen2 transformers.quantizers.quantizer_bnb_4bit"
PESADOS += " transformers.integrations.bitsandbytes torch.optim torch._dynamo"
BYTES_POR_PEDIDO = 1 << 20
SERVIDORES: list[subprocess.Popen] = []  # cada um acaba quando a entrada dele fecha, com este processo


class Processo:
    """Um filho do servidor; `pid`, `poll` e `wait` são como os de `subprocess.Popen`."""

    def __init__(
        self,
        argumentos: list[str],
        ambiente: dict[str, str],
        pasta: str,
        descritores: dict[int, int],
        soquete: str,
        sessao: bool = False,
    ) -> None:
        """Executa `argumentos`, com `descritores` ({número no filho: descritor aqui}) abertos e nenhum outro."""
        limite = resource.getrlimit(resource.RLIMIT_FSIZE)
        pedido = dict(argumentos=argumentos, ambiente=ambiente, pasta=pasta, numeros=list(descritores))
        pedido |= dict(limite=limite, sessao=sessao)
        self.returncode: int | None = None
        self.conexao = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.conexao.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BYTES_POR_PEDIDO)
        self.conexao.connect(soquete)
        socket.send_fds(self.conexao, [json.dumps(pedido).encode()], list(descritores.values()))
        self.pid = int(self.conexao.recv(64))

    def poll(self) -> int | None:
        """O código de saída, se já acabou."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Espera o fim e devolve o código de saída: negativo, o sinal que o matou."""
        if self.returncode is None:
            with selectors.DefaultSelector() as espera:
                espera.register(self.conexao, selectors.EVENT_READ)
                if not espera.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.returncode = int(self.conexao.recv(64))
            self.conexao.close()
        return self.returncode


@functools.cache
def executavel() -> str:
    """O executável que faz as vezes do Python; na primeira vez, inicia o servidor, que acaba com quem o iniciou."""
    pasta = Path(tempfile.mkdtemp(prefix="interprete-"))
    arquivo, soquete = pasta / "python", pasta / "soquete"
    escuta = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    escuta.bind(str(soquete))
    escuta.listen(64)  # quem chega antes que o servidor tenha importado tudo espera na fila
    codigo = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import interprete; interprete."
    arquivo.write_text(f'#!/bin/sh\nexec "{sys.executable}" -ISc "{codigo}pedir(\'{soquete}\')" "$@"\n')
    arquivo.chmod(0o700)
    servidor = subprocess.Popen(
        [sys.executable, "-c", f"{codigo}servir({escuta.fileno()}, {str(arquivo)!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,  # um arquivo não: o Python do servidor guardaria que se pode voltar nele
        stderr=subprocess.STDOUT,
        pass_fds=[escuta.fileno()],
        start_new_session=True,
        # o tqdm só lê TQDM_DISABLE ao ser importado, e o programa a põe antes disso
        env={**os.environ, "TQDM_DISABLE": "1", "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
    )
    SERVIDORES.append(servidor)
    escuta.close()
    Processo(["-c", ""], dict(os.environ), "/", {}, str(soquete)).wait()  # pronto: quem mede tempo não o espera
    return str(arquivo)


def soquete_de(python: str) -> str:
    """O endereço do servidor de um `executavel`."""
    return str(Path(python).with_name("soquete"))


def pedir(soquete: str) -> None:
    """O que o executável faz: passa ao filho tudo o que tem, repassa os sinais e acaba como ele."""
    abertos = [int(numero.name) for numero in Path("/proc/self/fd").iterdir()]
    descritores = {}
    for numero in abertos:
        with contextlib.suppress(OSError):  # o que servia para listar já fechou
            if numero < 3 or not fcntl.fcntl(numero, fcntl.F_GETFD) & fcntl.FD_CLOEXEC:
                descritores[numero] = numero
    filho = Processo(sys.argv[1:], dict(os.environ), str(Path.cwd()), descritores, soquete)
    for sinal in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sinal, lambda sinal, _: filho.conexao.send(b"%d" % sinal))
    for numero in descritores:  # quem lê a saída do filho sabe que ela acabou quando ele acaba
        os.close(numero)
    if (codigo := filho.wait()) >= 0:
        os._exit(codigo)
    signal.signal(-codigo, signal.SIG_DFL)
    os.kill(os.getpid(), -codigo)


def servir(escuta: int, python: str) -> None:
    """Importa tudo e atende aos pedidos até que a entrada feche; no filho, executa o pedido em vez de voltar."""
    import gc

    # o que as bibliotecas deixam aberto fica acima dos números que um filho vai receber
    baixos = [os.open(os.devnull, os.O_RDONLY) for _ in range(200)]
    for nome in PESADOS.split():
        with contextlib.suppress(ImportError):
            __import__(nome)
    for baixo in baixos:
        os.close(baixo)

    gc.collect()
    gc.freeze()  # as páginas do que já existe continuam divididas com os filhos
    ouvido = socket.socket(fileno=escuta)
    fila = selectors.DefaultSelector()
    fila.register(0, selectors.EVENT_READ)
    fila.register(ouvido, selectors.EVENT_READ)
    filhos: dict[int, tuple[socket.socket, int]] = {}  # pidfd → conexão e pid
    while True:
        for chave, _ in fila.select():
            if chave.fileobj is not ouvido and chave.fd != 0 and chave.fd not in fila.get_map():
                continue  # acabou com outro acontecimento desta mesma volta
            if chave.fd == 0:
                for _, pid in filhos.values():
                    os.kill(pid, signal.SIGKILL)
                shutil.rmtree(Path(python).parent, ignore_errors=True)
                return
            if chave.fileobj is ouvido:
                conexao, _ = ouvido.accept()
                conexao.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BYTES_POR_PEDIDO)
                fila.register(conexao, selectors.EVENT_READ)
            elif chave.fd in filhos:  # um filho acabou
                conexao, pid = filhos.pop(chave.fd)
                codigo = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    conexao.send(b"%d" % codigo)
                fila.unregister(chave.fd)
                os.close(chave.fd)
                with contextlib.suppress(KeyError):
                    fila.unregister(conexao)
                conexao.close()
            else:
                conexao = chave.fileobj
                dito, recebidos, *_ = socket.recv_fds(conexao, BYTES_POR_PEDIDO, 250)
                pid = next((pid for outra, pid in filhos.values() if outra is conexao), None)
                if pid is not None:  # um sinal para o filho, ou quem pediu morreu
                    os.kill(pid, int(dito or signal.SIGKILL))
                    if not dito:
                        fila.unregister(conexao)
                elif not dito:
                    fila.unregister(conexao)
                    conexao.close()
                elif pid := bifurcar():
                    conexao.send(b"%d" % pid)
                    for descritor in recebidos:
                        os.close(descritor)
                    filhos[pidfd := os.pidfd_open(pid)] = conexao, pid
                    fila.register(pidfd, selectors.EVENT_READ)
                else:
                    fila.close()
                    for aberto in (ouvido, conexao, *(outra for outra, _ in filhos.values())):
                        aberto.close()
                    for pidfd in filhos:
                        os.close(pidfd)
                    return nascer(json.loads(dito), recebidos, python)


def bifurcar() -> int:
    """`os.fork`, sem que o filho herde texto que o servidor ainda não escreveu."""
    sys.stdout.flush()
    sys.stderr.flush()
    return os.fork()


def nascer(pedido: dict, recebidos: list[int], python: str) -> None:
    """No filho: fica como um Python recém-iniciado com esses argumentos, e executa o que pedem."""
    import multiprocessing.spawn

    if pedido["sessao"]:
        os.setsid()
    altos = [fcntl.fcntl(recebido, fcntl.F_DUPFD, 900) for recebido in recebidos]
    for recebido in recebidos:
        os.close(recebido)
    for alto, numero in zip(altos, pedido["numeros"], strict=True):
        os.dup2(alto, numero)
        os.close(alto)
    os.chdir(pedido["pasta"])
    os.environ.clear()
    os.environ.update(pedido["ambiente"])
    resource.setrlimit(resource.RLIMIT_FSIZE, pedido["limite"])
    sys.executable = python
    multiprocessing.spawn.set_executable(python)
    dos_testes = str(Path(__file__).parent)
    extras = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    caminhos = [*extras, *(p for p in sys.path if p not in ("", dos_testes))]
    del sys.modules["interprete"]
    forma, *resto = itertools.dropwhile(lambda a: a[:1] == "-" and a not in ("-c", "-m"), pedido["argumentos"])
    codigo = 0
    try:
        executar(forma, resto, caminhos)
    except SystemExit as fim:
        codigo = fim.code if isinstance(fim.code, int) else int(fim.code is not None)
        if isinstance(fim.code, str):
            print(fim.code, file=sys.stderr)
    except BaseException:
        codigo = 1
        traceback.print_exc()
    # o fim de um Python, menos desfazer os módulos um a um: isso copiaria as páginas divididas com o servidor
    threading._shutdown()
    atexit._run_exitfuncs()
    for terminal in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # o resource_tracker fecha os seus
            terminal.flush()
    os._exit(codigo & 255)


def executar(forma: str, resto: list[str], caminhos: list[str]) -> None:
    """Executa `-c CÓDIGO`, `-m MÓDULO` ou um arquivo, como `__main__`."""
    if forma == "-c":
        codigo, *sys.argv[1:] = resto
        sys.argv[0], sys.path[:] = "-c", ["", *caminhos]
        sys.modules["__main__"] = principal = types.ModuleType("__main__")
        exec(compile(codigo, "<string>", "exec"), principal.__dict__)
    elif forma == "-m":
        sys.argv, sys.path[:] = resto, ["", *caminhos]
        runpy.run_module(resto[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:] = [forma, *resto], [str(Path(forma).parent), *caminhos]
        runpy.run_path(forma, run_name="__main__")
