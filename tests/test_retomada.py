"""Nada se perde: o programa é morto, interrompido e estragado de todo modo, e a execução seguinte termina igual."""

import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import CURTAS, Execucao, disse, executar, existe, guardar_base

import fine_tuning_saude as ft


def resultado(saida: Path) -> dict[str, str]:
    """As somas do que a execução entrega, e a prova de que ela acabou e não deixou restos."""
    registro = json.loads((saida / "execucao.json").read_text(encoding="utf-8"))
    assert registro["situacao"] == "concluída"
    assert list(registro["etapas"]) == list("123456789")
    restos = [*saida.rglob(f"{ft.PARCIAL}*"), *saida.rglob("*.parcial")]
    assert not restos
    arquivos = ("adaptador_lora/adapter_model.safetensors", "modelo_final/model.safetensors", "novo_modelo.gguf")
    return {arquivo: ft.sha256(saida / arquivo) for arquivo in arquivos}


@pytest.fixture(scope="module")
def pasta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uma pasta pessoal de mentira, com espaço e acento, em que tudo acontece."""
    return tmp_path_factory.mktemp("pasta") / "Área de Ana"


@pytest.fixture(scope="module")
def base(pasta: Path, phi3: Path) -> Path:
    """O Phi-3 minúsculo nesta pasta."""
    return Path(shutil.copytree(phi3, pasta / "base"))


@pytest.fixture(scope="module")
def intacta(pasta: Path, base: Path) -> tuple[Path, dict[str, str]]:
    """Uma execução que ninguém interrompeu, e as somas do que entregou.

    Num Python que começa do nada: se algo dependesse da ordem de um conjunto, que muda de um processo para outro, as
    outras execuções, filhas todas do mesmo servidor, teriam outra ordem que não a desta.
    """
    execucao = Execucao(pasta / "intacta", base, lancador=(sys.executable,), HOME=str(pasta))
    execucao.terminar()
    return execucao.saida, resultado(execucao.saida)


@pytest.fixture
def saida(pasta: Path, request: pytest.FixtureRequest) -> Path:
    """Uma pasta de saída para um teste."""
    return pasta / request.node.name[-50:]


@pytest.fixture
def com_base(saida: Path, intacta: tuple[Path, dict[str, str]]) -> Path:
    """Uma pasta de saída que só tem a base convertida."""
    return guardar_base(intacta[0], saida)


@pytest.fixture
def parada_no_treino(com_base: Path, base: Path) -> Iterator[Path]:
    """Uma execução morta no treino, depois do segundo checkpoint."""
    execucao = Execucao(com_base, base).esperar(existe(f"checkpoints/checkpoint-4/{ft.SOMAS}"))
    execucao.matar()
    yield com_base


@pytest.fixture
def pronta(saida: Path, intacta: tuple[Path, dict[str, str]]) -> Path:
    """Cópia da execução que acabou."""
    return Path(shutil.copytree(intacta[0], saida))


MOMENTOS = {
    "etapa_1_conversao_da_base": existe(f"checkpoints/{ft.PARCIAL}base-*/base/*.gguf"),
    "etapas_2_a_6": disse("[6/9]"),  # e antes, na mesma pasta, em cada uma das outras
    "etapa_7_antes_do_checkpoint": disse("passo 1/"),
    "etapa_7_checkpoint_pela_metade": existe("checkpoints/checkpoint-4/adapter_model.safetensors"),
    "etapa_7_adaptador_pela_metade": existe(f"{ft.PARCIAL}adaptador_lora-*"),
    "etapa_8_modelo_pela_metade": existe(f"{ft.PARCIAL}modelo_final-*/modelo_final/model.safetensors"),
    "etapa_9_gguf_pela_metade": existe(f"{ft.PARCIAL}gguf-*/f16.gguf"),
    "etapa_9_entregue_e_nao_registrado": existe("novo_modelo.gguf"),
}


# o adaptador é escrito em milissegundos: com uma pausa, o momento não passa despercebido
DEVAGAR = "import shutil, time; copiar = shutil.copyfile; shutil.copyfile = lambda *a: (copiar(*a), time.sleep(2))"


@pytest.fixture(scope="module")
def mortas(pasta: Path, base: Path, intacta: tuple[Path, dict[str, str]]) -> dict[str, str]:
    """Para cada momento: mata o programa nele, executa de novo e guarda o que a segunda execução disse, se acabou."""

    def matar_e_repetir(momento: str) -> str:
        saida = pasta / momento
        if "etapa_1" not in momento:
            guardar_base(intacta[0], saida)
        antes = DEVAGAR if "adaptador" in momento else ""
        for etapa in range(2, 6) if momento == "etapas_2_a_6" else ():
            Execucao(saida, base).esperar(disse(f"[{etapa}/9]")).matar()
        Execucao(saida, base, antes=antes).esperar(MOMENTOS[momento]).matar()
        return Execucao(saida, base).terminar()

    with ThreadPoolExecutor(2) as dois:
        return dict(zip(MOMENTOS, dois.map(matar_e_repetir, MOMENTOS), strict=True))


@pytest.mark.parametrize("momento", MOMENTOS)
def test_morto_em_qualquer_momento_a_execucao_seguinte_termina_igual_bit_por_bit(
    momento: str, pasta: Path, mortas: dict[str, str], intacta: tuple[Path, dict[str, str]]
) -> None:
    assert resultado(pasta / momento) == intacta[1]
    dito = mortas[momento]
    assert ("continuando de checkpoint-" in dito) == ("checkpoint_pela" in momento or "adaptador" in momento)
    assert dito.count("pronta desde uma execução anterior") == {"etapa_8": 1, "etapa_9": 2}.get(momento[:7], 0)


def test_checkpoint_truncado_e_apagado_e_o_anterior_serve(
    parada_no_treino: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    arquivo = parada_no_treino / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    os.truncate(arquivo, arquivo.stat().st_size // 2)
    dito = Execucao(parada_no_treino, base).terminar()
    assert "checkpoint-4 não está inteiro: apagado" in dito and "continuando de checkpoint-2" in dito
    assert resultado(parada_no_treino) == intacta[1]


def test_relogio_que_anda_para_tras_nao_confunde_os_checkpoints(
    parada_no_treino: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    amanha = time.time() + 86_400
    for pasta in (parada_no_treino / "checkpoints" / "checkpoint-2", parada_no_treino / "execucao.json"):
        os.utime(pasta, (amanha, amanha))
    assert "continuando de checkpoint-4" in Execucao(parada_no_treino, base).terminar()
    assert resultado(parada_no_treino) == intacta[1]
    ultimo, penultimo, *_ = (int(c.name.split("-")[1]) for c in ft.checkpoints(parada_no_treino / "checkpoints"))
    assert ultimo - 2 <= penultimo < ultimo and ultimo > 4, "ficam os dois de passo maior"


def test_ctrl_c_para_na_hora_e_a_execucao_seguinte_continua_do_ultimo_checkpoint(
    com_base: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    # quem é iniciado em segundo plano herda o Ctrl-C ignorado; aqui ele vale, como num terminal
    devagar = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    devagar += "import time, transformers; passo = transformers.Trainer.training_step\n"  # senão, o treino já acabou
    devagar += "transformers.Trainer.training_step = lambda *a, **o: (time.sleep(0.5), passo(*a, **o))[1]"
    execucao = Execucao(com_base, base, antes=devagar).esperar(existe(f"checkpoints/checkpoint-2/{ft.SOMAS}"))
    os.kill(execucao.processo.pid, signal.SIGINT)
    assert "interrompido por quem executa" in execucao.terminar(130)
    assert "continuando de checkpoint-" in Execucao(com_base, base).terminar()
    assert resultado(com_base) == intacta[1]


ESTRAGOS = {"adaptador": "adaptador_lora/adapter_model.safetensors", "gguf": "novo_modelo.gguf"}
ESTRAGOS |= {"modelo_final": "modelo_final/model.safetensors"}


@pytest.mark.parametrize("escrito", ["Modelfile", "README.md", "perda.png"])
def test_o_que_se_escreve_ao_lado_do_gguf_tambem_se_refaz(escrito: str, intacta: tuple[Path, dict[str, str]]) -> None:
    assert ft.contar_prontas(intacta[0], registro := json.loads((intacta[0] / "execucao.json").read_bytes())) == 9
    (intacta[0] / escrito).rename(intacta[0] / "guardado")
    assert ft.contar_prontas(intacta[0], registro) == 8
    (intacta[0] / "guardado").rename(intacta[0] / escrito)


def test_o_que_a_etapa_1_manda_corrigir_se_corrige_na_mesma_pasta(saida: Path, base: Path, tmp_path: Path) -> None:
    dados = tmp_path / "dados.jsonl"
    linhas = CURTAS.read_text(encoding="utf-8").splitlines()[:30]
    dados.write_text("\n".join([linhas[0].replace('"input": "', '"input": "<|end|> '), *linhas[1:]]), encoding="utf-8")
    assert f"{dados}:1: traz <|end|>" in Execucao(saida, base, "--arquivo-dados", dados).terminar(2)
    dados.write_text("\n".join(linhas), encoding="utf-8")
    curto = Execucao(saida, base, "--arquivo-dados", dados, "--max-length", "20").terminar(2)
    assert "mais que MAX_LENGTH, 20" in curto
    execucao = Execucao(saida, base, "--arquivo-dados", dados).esperar(disse("[7/9]"))
    execucao.matar()


@pytest.mark.parametrize("estrago", ESTRAGOS)
def test_resultado_truncado_e_refeito(
    estrago: str, pronta: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    arquivo = pronta / ESTRAGOS[estrago]
    os.truncate(arquivo, arquivo.stat().st_size // 2)
    dito = Execucao(pronta, base).terminar()
    assert dito.count("pronta desde") == {"adaptador": 0, "modelo_final": 1, "gguf": 2}[estrago]
    assert resultado(pronta) == intacta[1]


def test_execucao_pronta_nao_e_refeita_e_mudar_so_o_gguf_nao_treina_de_novo(
    pronta: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    inicio = (pronta / "modelo_final" / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(pronta / "checkpoints")  # o README diz que, com tudo pronto, pode
    assert "nada a fazer" in Execucao(pronta, base).terminar()
    assert resultado(pronta) == intacta[1]
    assert (pronta / "modelo_final" / "model.safetensors").stat().st_mtime_ns == inicio
    dito = Execucao(pronta, base, "--quantizacoes-gguf", "q8_0", "q4_k_m").terminar()
    assert "mudou QUANTIZACOES_GGUF" in dito and "passo 1/" not in dito
    assert (pronta / "novo_modelo-q4_k_m.gguf").is_file()


def test_outra_execucao_na_mesma_pasta_e_recusada_com_o_que_mudou_e_recomecar_a_aceita(
    pronta: Path, base: Path, tmp_path: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    mudados = tmp_path / "dados.jsonl"
    mudados.write_text(CURTAS.read_text(encoding="utf-8").replace("APS", "atenção primária"), encoding="utf-8")
    opcoes = ("--arquivo-dados", mudados, "--lora-r", "8")
    dito = Execucao(pronta, base, *opcoes).terminar(2)
    assert "LORA_R: era 16 e agora é 8" in dito and "SHA-256 dos dados" in dito and "--recomecar" in dito
    assert resultado(pronta) == intacta[1], "a recusa não toca no que estava pronto"
    assert "recomeçando" in Execucao(pronta, base, *opcoes, "--recomecar").terminar()
    assert resultado(pronta) != intacta[1]


def test_no_meio_do_treino_outra_execucao_tambem_e_recusada(parada_no_treino: Path, base: Path) -> None:
    assert "LORA_R: era 16 e agora é 8" in Execucao(parada_no_treino, base, "--lora-r", "8").terminar(2)
    assert ft.checkpoints(parada_no_treino / "checkpoints")


def test_ao_recomecar_ainda_se_conversa_com_o_modelo_de_antes(pronta: Path) -> None:
    antes = json.loads((pronta / "execucao.json").read_text(encoding="utf-8"))["gguf"]
    ft.Registro(ft.ler_opcoes(["--dir-saida", str(pronta)])).continuar(recomecar=True)
    feito = executar("--perguntar", "O que é APS?", "--dir-saida", pronta)
    assert feito.returncode == 0 and antes and not ft.checkpoints(pronta / "checkpoints"), feito.stderr


def test_modelo_base_truncado_e_dito_e_consertado_a_execucao_continua(
    parada_no_treino: Path, base: Path, tmp_path: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    estragada = Path(shutil.copytree(base, tmp_path / "base"))
    os.truncate(estragada / "model.safetensors", 1_000_000)
    assert "model.safetensors truncado" in Execucao(parada_no_treino, estragada).terminar(2)
    assert "continuando de checkpoint-4" in Execucao(parada_no_treino, base).terminar()
    assert resultado(parada_no_treino) == intacta[1]


def test_duas_execucoes_na_mesma_pasta_a_segunda_e_recusada(
    com_base: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    primeira = Execucao(com_base, base).esperar(disse("[7/9]"))
    assert f"outra execução está usando {com_base}" in Execucao(com_base, base).terminar(2)
    primeira.terminar()
    assert resultado(com_base) == intacta[1]


CHEIOS = {"etapa_7": ("[7/9]", 50_000), "etapa_8": ("[8/9]", 1_000_000), "etapa_9": ("[9/9]", 1_000_000)}
CHEIOS |= {"etapa_9_quantizacao": ("f16: KL", 1_000_000)}


@pytest.mark.parametrize("etapa", CHEIOS)
def test_disco_cheio_e_dito_em_uma_frase_e_com_espaco_a_execucao_continua(
    etapa: str, saida: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    momento, bytes_por_arquivo = CHEIOS[etapa]
    if etapa == "etapa_7":
        guardar_base(intacta[0], saida)
    else:  # de uma execução pronta, a que falta o que a etapa faz
        shutil.copytree(intacta[0], saida)
        (saida / "novo_modelo.gguf").unlink()
        if etapa == "etapa_8":
            shutil.rmtree(saida / "modelo_final")
    execucao = Execucao(saida, base).esperar(disse(momento))
    resource.prlimit(execucao.processo.pid, resource.RLIMIT_FSIZE, (bytes_por_arquivo, resource.RLIM_INFINITY))
    dito = execucao.terminar(1)
    erro = dito.partition("ERRO: ")[2].strip()
    assert "disco encheu" in erro and "\n" not in erro, dito
    assert not list(saida.glob("novo_modelo*"))
    Execucao(saida, base).terminar()
    assert resultado(saida) == intacta[1]


def test_falta_de_memoria_da_gpu_e_dita_e_a_execucao_seguinte_continua(
    com_base: Path, base: Path, intacta: tuple[Path, dict[str, str]]
) -> None:
    faltar = (
        "import torch, transformers\n"
        "passo = transformers.Trainer.training_step\n"
        "def estourar(self, *a, **o):\n"
        "    if self.state.global_step == 5:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')\n"
        "    return passo(self, *a, **o)\n"
        "transformers.Trainer.training_step = estourar\n"
    )
    dito = Execucao(com_base, base, antes=faltar).terminar(1)
    assert "faltou memória" in dito and "MAX_TOKENS_POR_LINHA" in dito
    assert "continuando de checkpoint-4" in Execucao(com_base, base).terminar()
    assert resultado(com_base) == intacta[1]


def test_pasta_em_que_nao_se_escreve_e_dita(tmp_path: Path, base: Path) -> None:
    execucao = Execucao(tmp_path / "saida", base, "--dir-saida", "/proc/saida")
    assert execucao.processo.wait(60) in (1, 2)
    assert "/proc" in execucao.dito and "ERRO" in execucao.dito and "Traceback" not in execucao.dito


def test_falta_de_disco_e_de_memoria_sao_ditas_antes_do_treino(saida: Path, base: Path) -> None:
    pouco = (
        "import shutil, psutil, collections\n"
        "shutil.disk_usage = lambda _: collections.namedtuple('U', 'total used free')(1, 1, 1000)\n"
        "psutil.virtual_memory = lambda: collections.namedtuple('M', 'available total')(1000, 1000)\n"
    )
    dito = Execucao(saida, base, antes=pouco).terminar(2)
    assert "GiB de memória" in dito and dito.count("use uma base menor") == 2 and "o disco de" in dito
    assert not saida.exists()


def test_nenhum_arquivo_escrito_traz_o_caminho_da_pasta_pessoal(
    intacta: tuple[Path, dict[str, str]], pasta: Path
) -> None:
    pessoal = str(pasta).encode()
    escritos = [arquivo for arquivo in intacta[0].rglob("*") if arquivo.is_file()]
    assert len(escritos) > 20
    for arquivo in escritos:
        conteudo = arquivo.read_bytes()
        assert pessoal not in conteudo and json.dumps(str(pasta))[1:-1].encode() not in conteudo, arquivo


def test_um_arquivo_preso_por_outro_programa_e_esperado_um_minuto_e_dito(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "de").write_text("novo")
    trocar, esperas, preso_por = os.replace, [], 50.0

    def preso(de: Path, para: Path) -> None:
        if sum(esperas) < preso_por:
            raise PermissionError(13, "aberto pelo antivírus")
        trocar(de, para)

    monkeypatch.setattr(os, "replace", preso)
    monkeypatch.setattr(time, "sleep", esperas.append)
    caplog.set_level("INFO", "fine_tuning_saude")
    ft.insistir(os.replace, tmp_path / "de", tmp_path / "para")
    assert (tmp_path / "para").read_text() == "novo" and "largue para" in caplog.text
    preso_por = math.inf
    with pytest.raises(PermissionError):
        ft.insistir(os.replace, tmp_path / "para", tmp_path / "de")
    assert 55 <= sum(esperas) - 51.2 <= 65


# como no Windows: o que este processo, ou o mapa de memória dele, tem aberto não se troca, renomeia nem apaga
COMO_NO_WINDOWS = """
import os
def abertos():
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            pass
    with open("/proc/self/maps", encoding="utf-8") as mapas:
        yield from (linha.split(None, 5)[5].strip() for linha in mapas if "/" in linha)
def recusar(funcao):
    def recusada(caminho, *resto, dir_fd=None, **opcoes):
        de_onde = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        alvo = os.path.join(de_onde, os.fspath(caminho))
        if resto and presos(resto[0]) or presos(alvo):
            raise PermissionError(13, "aberto por este processo", alvo)
        if dir_fd is not None:
            opcoes["dir_fd"] = dir_fd
        return funcao(caminho, *resto, **opcoes)
    def presos(alvo):
        alvo = os.path.abspath(os.fspath(alvo))
        pasta = os.path.isdir(alvo)
        return any(aberto == alvo and not pasta or aberto.startswith(alvo + "/") for aberto in abertos())
    return recusada
for nome in ("replace", "rename", "unlink", "remove"):
    setattr(os, nome, recusar(getattr(os, nome)))
import builtins, io, sys
abrir = builtins.open
def como_texto(arquivo, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **opcoes):
    if "b" not in mode:  # sem que se diga outra coisa, a página de código e a quebra de linha de lá
        encoding = "cp1252" if encoding in (None, "locale") else encoding
        newline = "\\r\\n" if newline is None and set(mode) & set("wax+") else newline
    return abrir(arquivo, mode, buffering, encoding, errors, newline, **opcoes)
builtins.open = io.open = como_texto
"""


def test_nada_que_esta_aberto_e_trocado_nem_apagado_como_o_windows_exige(saida: Path, base: Path) -> None:
    Execucao(saida, base, antes=COMO_NO_WINDOWS).terminar()
    mudada = Execucao(saida, base, "--quantizacoes-gguf", "q5_0", antes=COMO_NO_WINDOWS)
    assert "mudou QUANTIZACOES_GGUF" in mudada.terminar()
    assert not list(saida.rglob(f"{ft.PARCIAL}*")) and json.loads((saida / "execucao.json").read_text("utf-8"))
    # o que outro programa lê, e não é JSON, a que a quebra de linha não importa
    for arquivo in [saida / "Modelfile", saida / "modelo_final" / "chat_template.jinja", *saida.rglob(ft.SOMAS)]:
        assert b"\r" not in arquivo.read_bytes() and arquivo.read_text("utf-8"), arquivo


def test_o_que_se_escreve_tem_nome_que_o_windows_aceita(
    intacta: tuple[Path, dict[str, str]],
) -> None:
    reservados = {"con", "prn", "aux", "nul", *(f"{porta}{n}" for porta in ("com", "lpt") for n in range(1, 10))}
    for escrito in intacta[0].rglob("*"):
        relativo = escrito.relative_to(intacta[0])
        assert not re.search(r'[<>:"|?*\\]|[. ]$', escrito.name), relativo
        assert escrito.name.partition(".")[0].lower() not in reservados and len(str(relativo)) < 120, relativo
    programa = Path(ft.__file__).read_text(encoding="utf-8")
    assert "symlink" not in programa and "os.fork" not in programa
    assert programa.count("get_context(") == programa.count('get_context("spawn")') >= 2
