"""O que os testes dividem: o programa executado como um usuário o executa, e modelos minúsculos para ele."""

import atexit
import contextlib
import hashlib
import json
import multiprocessing.spawn
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from interprete import Processo, executavel, soquete_de

RAIZ = Path(__file__).parent.parent
sys.path.insert(0, str(RAIZ))
# um fio do libgomp que espera dormindo não rouba o processador a quem calcula, numa máquina com mais fios que núcleos
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
PROGRAMA = RAIZ / "fine_tuning_saude.py"
DADOS = RAIZ / "perguntas_respostas_APS_2000.jsonl"
# as linhas mais curtas do arquivo de dados, que custam menos da metade a treinar, medir e provar
CURTAS = Path(tempfile.mkdtemp(prefix="curtas-")) / "curtas.jsonl"
CURTAS.write_text("\n".join(sorted(DADOS.read_text(encoding="utf-8").splitlines(), key=len)[:80]), encoding="utf-8")
atexit.register(shutil.rmtree, CURTAS.parent)
# poucas linhas, taxa alta e várias passagens: o adaptador de um modelo minúsculo muda o bastante para ser visto
OPCOES_RAPIDAS = ["--arquivo-dados", str(CURTAS), "--treinar-na-cpu", "--learning-rate", "0.01"]
OPCOES_RAPIDAS += ["--num-train-epochs", "2", "--max-exemplos", "24"]
OPCOES_RAPIDAS += ["--fracao-validacao", "0.25", "--max-new-tokens", "8", "--gradient-accumulation-steps", "2"]
OPCOES_RAPIDAS += ["--exemplos-prova", "5", "--exemplos-imatrix", "4"]
OPCOES_RAPIDAS += ["--max-length", "256", "--max-tokens-por-linha", "256"]

# as mesmas, com linhas menores e mais checkpoints: a opção repetida vale por último
OPCOES = [*OPCOES_RAPIDAS, "--gradient-accumulation-steps", "1", "--max-exemplos", "16"]
OPCOES += ["--max-new-tokens", "4", "--exemplos-prova", "3", "--exemplos-imatrix", "2"]
OPCOES += ["--max-length", "128", "--max-tokens-por-linha", "224", "--save-steps", "2", "--logging-steps", "1"]
OPCOES += ["--quantizacoes-gguf", "q8_0", "--dir-llama-cpp", str(RAIZ / "llama.cpp")]
# dois processos nesta máquina
DOIS = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
# um fio: com a mesma conta na mesma ordem, o resultado tem de ser o mesmo bit por bit
AMBIENTE = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}


def linhas_reais(quantas: int | None = None) -> list[dict[str, str]]:
    """As primeiras linhas do arquivo de dados, ou todas."""
    return [json.loads(linha) for linha in DADOS.read_text(encoding="utf-8").splitlines()[:quantas]]


def exemplos_reais(base: Path, quantos: int) -> list[dict]:
    """As primeiras linhas do arquivo de dados, codificadas como na etapa 5 com o tokenizer de `base`."""
    from transformers import AutoTokenizer

    import fine_tuning_saude as ft

    tokenizer = AutoTokenizer.from_pretrained(base)
    fim = ft.achar_fim_de_turno(tokenizer)
    pares = [ft.Par(i, linha["input"], linha["output"]) for i, linha in enumerate(linhas_reais(quantos))]
    return [ft.codificar(tokenizer, fim, par) | par._asdict() for par in pares]


def preparar(base: Path) -> Any:
    """O que a etapa 1 entregaria às etapas 3 e 6, sem dados, na CPU."""
    import fine_tuning_saude as ft

    return ft.Preparo(
        [], "cpu", recalculadas=0, desfeita=True, dir_base=base, conversor=base, gguf_base=None, ajustes={}
    )


def executar(
    *opcoes: object, pasta: Path = RAIZ, python: str = "", **ambiente: str
) -> subprocess.CompletedProcess[str]:
    """Executa o programa em `pasta`, com o llama.cpp do projeto, e devolve código de saída e o que ele disse.

    O Python é o de `interprete`, ou `python`, se o que se quer provar pede um que comece do nada.
    """
    comando = [python or executavel(), str(PROGRAMA), "--dir-llama-cpp", str(RAIZ / "llama.cpp"), *map(str, opcoes)]
    return subprocess.run(
        comando, cwd=pasta, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **ambiente}
    )


def executar_ate_o_fim(*opcoes: object, **ambiente: str) -> dict:
    """Executa o programa, exige que termine bem e devolve o registro que ele escreveu."""
    feito = executar(*opcoes, **ambiente)
    assert feito.returncode == 0, f"{feito.stdout}\n{feito.stderr}"
    saida = Path(opcoes[opcoes.index("--dir-saida") + 1])
    return json.loads((saida / "execucao.json").read_text(encoding="utf-8"))


class Execucao:
    """O programa em andamento, em um grupo de processos só seu."""

    def __init__(
        self, saida: Path, base: Path, *opcoes: object, antes: str = "", lancador: tuple[str, ...] = (), **ambiente: str
    ) -> None:
        programa = ["-c", f"{antes}\nimport sys; import fine_tuning_saude as ft; sys.exit(ft.main(sys.argv[1:]))"]
        programa = programa if antes else [str(PROGRAMA)]
        comando = [*lancador, *programa, "--dir-saida", saida, "--modelo-base", base, *OPCOES, *opcoes]
        comando = list(map(str, comando))
        ambiente = {**os.environ, **AMBIENTE, "PYTHONPATH": str(RAIZ), **ambiente}
        self.registro, self.saida = saida.with_name(f"{saida.name}-{time.monotonic_ns()}.txt"), saida
        with self.registro.open("w") as f:
            if lancador:
                self.processo = subprocess.Popen(
                    comando, stdout=f, stderr=f, cwd=saida.parent, env=ambiente, start_new_session=True
                )
            else:
                soquete, pasta, abertos = soquete_de(executavel()), str(saida.parent), {1: f.fileno(), 2: f.fileno()}
                self.processo = Processo(comando, ambiente, pasta, abertos, soquete, sessao=True)

    @property
    def dito(self) -> str:
        """Tudo o que o programa escreveu até agora."""
        return self.registro.read_text(encoding="utf-8", errors="replace")

    def esperar(self, momento: Callable[["Execucao"], object]) -> "Execucao":
        """Espera até que `momento` seja verdade, e falha se o programa acaba antes."""
        while not momento(self):
            assert self.processo.poll() is None, f"acabou antes do momento:\n{self.dito}"
            time.sleep(0.005)
        return self

    def matar(self) -> None:
        """SIGKILL no programa e em tudo o que ele abriu."""
        os.killpg(self.processo.pid, signal.SIGKILL)
        self.processo.wait()

    def terminar(self, codigo: int = 0) -> str:
        """Espera o fim, exige o código de saída e nenhum traceback, e devolve o que foi dito."""
        assert self.processo.wait(timeout=300) == codigo, self.dito
        assert "Traceback" not in self.dito, self.dito
        return self.dito


def guardar_base(pronta: Path, saida: Path) -> Path:
    """Põe em `saida` a base que a execução `pronta` converteu e provou: quem não prova a etapa 1 não espera por ela."""
    shutil.copytree(pronta / "checkpoints" / "base", saida / "checkpoints" / "base")
    return saida


def disse(texto: str) -> Callable[[Execucao], bool]:
    """O momento em que o programa escreve `texto`."""
    return lambda execucao: texto in execucao.dito


def existe(padrao: str) -> Callable[[Execucao], bool]:
    """O momento em que aparece na pasta de saída um arquivo desse padrão."""
    return lambda execucao: next(execucao.saida.glob(padrao), None)


@pytest.fixture(scope="session")
def vocabularios(pytestconfig: pytest.Config) -> Path:
    """Pasta com vocabulários reais em GGUF, do mesmo sdist fixado de onde o programa tira o conversor."""
    import fine_tuning_saude as ft

    pasta = pytestconfig.cache.mkdir("vocabularios")
    nomes = {f"ggml-vocab-{nome}.gguf" for nome in ("phi-3", "llama-bpe", "qwen2")}
    if faltam := {nome for nome in nomes if not (pasta / nome).is_file()}:
        with tempfile.TemporaryDirectory() as temporaria:
            sdist = ft.buscar_pacote(ft.SDIST_LLAMA_CPP, Path(temporaria))
            with tarfile.open(sdist) as tar:
                for membro in tar:
                    if (nome := Path(membro.name).name) in faltam:
                        (pasta / nome).write_bytes(tar.extractfile(membro).read())
    return pasta


@pytest.fixture(scope="session")
def construido(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory, vocabularios: Path
) -> Callable[..., Path]:
    """Função que dá uma cópia, só desta sessão, de um modelo minúsculo: o nome dele em `modelos` e o que o distingue.

    Construir um pede de 3 a 12 segundos: ficam guardados de uma sessão para outra, enquanto não mudam o código que os
    constrói, os vocabulários e as versões do que os escreve.
    """
    import modelos

    partes = [Path(modelos.__file__).read_text(encoding="utf-8"), *sorted(a.name for a in vocabularios.iterdir())]
    partes += [metadata.version(pacote) for pacote in ("torch", "transformers", "tokenizers", "gguf", "sentencepiece")]
    guardados = pytestconfig.cache.mkdir("modelos") / hashlib.sha256(repr(partes).encode()).hexdigest()[:16]

    def construir(nome: str, *opcoes: object) -> Path:
        guardado = guardados / "-".join(map(str, (nome, *opcoes)))
        if not guardado.is_dir():
            with tempfile.TemporaryDirectory(dir=pytestconfig.cache.mkdir("modelos")) as temporaria:
                origem = vocabularios / "ggml-vocab-phi-3.gguf" if nome == "phi3" else vocabularios
                getattr(modelos, f"construir_{nome}")(Path(temporaria) / "modelo", origem, *opcoes)
                guardados.mkdir(exist_ok=True)
                (Path(temporaria) / "modelo").rename(guardado)
        # um nome que não diz que modelo é
        return Path(shutil.copytree(guardado, tmp_path_factory.mktemp("base") / "minusculo"))

    return construir


@pytest.fixture(scope="session")
def phi3(construido: Callable[..., Path]) -> Path:
    """Um Phi-3 completo de 2 camadas, numa pasta cujo nome não diz que é um Phi-3."""
    return construido("phi3")


@pytest.fixture
def filhos_rapidos(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faz os processos que o próprio pytest abre, o conversor e os da prova, nascerem com tudo importado."""
    monkeypatch.setattr(sys, "executable", executavel())
    monkeypatch.setattr(multiprocessing.spawn, "_python_exe", os.fsencode(executavel()))


# quem tenta sair da máquina é recusado, e a tentativa fica escrita
SEM_REDE = """
import os, socket
def recusar(*args, **opcoes):
    with open(os.environ["TENTATIVAS_DE_REDE"], "a") as f:
        f.write(f"{args[1:]}\\n")
    raise socket.gaierror("rede recusada pelo teste")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = recusar
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Deixa para o fim os testes que esperam pela demonstração, que enquanto isso vai ao lado dos outros."""
    items.sort(key=lambda item: "demonstracao" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def demonstracao_ao_lado(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen] | Exception | None]:
    """`python fine_tuning_saude.py --demo`, o mais longo: começa antes dos testes e vai ao lado deles.

    Executa sem rede, com o que ela baixa já na máquina. Dá a pasta de saída e o processo, se algum teste os pede.
    """
    if not any("demonstracao" in item.fixturenames for item in request.session.items):
        yield None
        return
    import fine_tuning_saude as ft

    pasta = tmp_path_factory.mktemp("demo")
    saida = pasta / "saida"
    opcoes = ["--demo", "--dir-saida", str(saida), "--dir-llama-cpp", str(RAIZ / "llama.cpp")]
    cfg = ft.ler_opcoes(opcoes)
    try:
        ft.garantir_llama_cpp(cfg)
        ft.preparar_modelo_demo(cfg)
    except ft.ErroDeUso as sem_rede:  # só falham os testes que a pedem
        yield sem_rede
        return
    (pasta / "sitecustomize.py").write_text(SEM_REDE)
    ambiente = {"PYTHONPATH": str(pasta), "TENTATIVAS_DE_REDE": str(pasta / "tentativas.txt"), "OMP_NUM_THREADS": "1"}
    with (pasta / "dito.txt").open("w") as dito:
        comando, abertos = [sys.executable, PROGRAMA, *opcoes], dict(stdout=dito, stderr=dito, cwd=RAIZ)
        processo = subprocess.Popen(comando, env={**os.environ, **ambiente}, start_new_session=True, **abertos)
    yield saida, processo
    with contextlib.suppress(ProcessLookupError):
        os.killpg(processo.pid, signal.SIGKILL)
    processo.wait()


@pytest.fixture(scope="session")
def demonstracao(demonstracao_ao_lado: tuple[Path, subprocess.Popen] | Exception) -> tuple[Path, dict]:
    """A pasta de saída e o registro da demonstração (`demonstracao_ao_lado`), que tem de terminar bem."""
    if isinstance(demonstracao_ao_lado, Exception):
        raise demonstracao_ao_lado
    saida, processo = demonstracao_ao_lado
    assert processo.wait() == 0, (saida.parent / "dito.txt").read_text(encoding="utf-8")
    return saida, json.loads((saida / "execucao.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def execucao_phi3(tmp_path_factory: pytest.TempPathFactory, phi3: Path) -> tuple[Path, dict]:
    """As nove etapas sobre o Phi-3 minúsculo: a pasta de saída e o registro."""
    saida = tmp_path_factory.mktemp("execucao") / "saída com espaço"
    registro = executar_ate_o_fim("--modelo-base", phi3, "--dir-saida", saida, *OPCOES_RAPIDAS, "--adaptador-gguf")
    return saida, registro
