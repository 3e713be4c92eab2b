"""Vários processos fazem um só modelo: o torchrun com dois, na CPU (gloo), contra um processo."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import DOIS, Execucao, existe, guardar_base
from interprete import executavel

import fine_tuning_saude as ft

ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2")
# o mesmo número de linhas por passo: duas de um processo, ou uma de cada um
UM_SO = ["--gradient-accumulation-steps", "2"]


def rapidos() -> dict[str, str]:
    """O ambiente em que o torchrun, que é o de verdade, abre os processos com tudo importado (`interprete`)."""
    return {"PYTHON_EXEC": executavel()}


def curva(saida: Path) -> list[tuple[int, str, float]]:
    """[passo, nome, valor] do diário do treino; o último ponto é o passo cujo adaptador foi entregue."""
    registro = json.loads((saida / "execucao.json").read_text(encoding="utf-8"))
    assert registro["situacao"] == "concluída"
    perda = registro["perda_validacao"]
    return [*perda["curva"], [perda["passo"], "entregue", perda["depois"]]]


@pytest.fixture(scope="module")
def um_processo(tmp_path_factory: pytest.TempPathFactory, phi3: Path) -> Path:
    """A execução de um processo que soma duas linhas por passo."""
    saida = tmp_path_factory.mktemp("um") / "saida"
    Execucao(saida, phi3, *UM_SO).terminar()
    return saida


@pytest.fixture(scope="module")
def dois_processos(tmp_path_factory: pytest.TempPathFactory, phi3: Path) -> tuple[Path, str]:
    """A execução de dois processos, uma linha de cada por passo, e o que ela disse."""
    saida = tmp_path_factory.mktemp("dois") / "saida"
    return saida, Execucao(saida, phi3, lancador=DOIS, **rapidos()).terminar()


@pytest.fixture
def morta(tmp_path: Path, phi3: Path, um_processo: Path) -> Iterator[tuple[Path, str]]:
    """Dois processos, dos quais o segundo é morto no treino, depois de um checkpoint: a pasta e o que se disse."""
    saida = guardar_base(um_processo, tmp_path / "saida")
    execucao = Execucao(saida, phi3, lancador=DOIS, **rapidos()).esperar(existe(f"checkpoints/checkpoint-2/{ft.SOMAS}"))
    filhos = {p.environ()["RANK"]: p for p in psutil.Process(execucao.processo.pid).children()}
    filhos["1"].send_signal(signal.SIGKILL)
    assert execucao.processo.wait(timeout=120) != 0
    yield saida, execucao.dito


def test_dois_processos_treinam_o_mesmo_que_um_com_o_dobro_da_acumulacao(
    um_processo: Path, dois_processos: tuple[Path, str]
) -> None:
    de_um, de_dois = curva(um_processo), curva(dois_processos[0])
    assert [ponto[:2] for ponto in de_um] == [ponto[:2] for ponto in de_dois]
    assert len([nome for _, nome, _ in de_um if nome == "loss"]) > 4
    for (passo, nome, antes), (_, _, depois) in zip(de_um, de_dois, strict=True):
        assert depois == pytest.approx(antes, abs=1e-4), (passo, nome)


def test_o_accelerate_launch_faz_o_mesmo_que_o_torchrun(
    tmp_path: Path, phi3: Path, um_processo: Path, dois_processos: tuple[Path, str]
) -> None:
    saida = guardar_base(um_processo, tmp_path / "saida")
    Execucao(saida, phi3, lancador=ACCELERATE, **rapidos()).terminar()
    assert json.loads((saida / "execucao.json").read_text(encoding="utf-8"))["processos"] == 2
    assert curva(saida) == curva(dois_processos[0])


def test_um_so_processo_fala_e_escreve(dois_processos: tuple[Path, str]) -> None:
    saida, dito = dois_processos
    for etapa in range(1, 10):
        assert dito.count(f"[{etapa}/9]") == 1
    assert dito.count("passo 1/") == 1
    assert json.loads((saida / "execucao.json").read_text(encoding="utf-8"))["processos"] == 2
    assert not [*saida.rglob(f"{ft.PARCIAL}*")]
    assert ft.esta_inteira(saida / "adaptador_lora") and ft.esta_inteira(ft.checkpoints(saida / "checkpoints")[0])


def test_um_processo_morto_encerra_a_execucao_com_uma_frase_e_a_seguinte_continua(
    morta: tuple[Path, str], dois_processos: tuple[Path, str], phi3: Path
) -> None:
    saida, dito = morta
    assert "ERRO no processo 0: " in dito and "execute de novo" in dito
    assert "continuando de checkpoint-" in Execucao(saida, phi3, lancador=DOIS, **rapidos()).terminar()
    for (passo, nome, antes), (_, _, depois) in zip(curva(dois_processos[0]), curva(saida), strict=True):
        assert depois == pytest.approx(antes, abs=1e-4), (passo, nome)


def test_o_que_dois_comecaram_um_continua_se_as_linhas_por_passo_sao_as_mesmas(
    morta: tuple[Path, str], um_processo: Path, phi3: Path
) -> None:
    saida = morta[0]
    dito = Execucao(saida, phi3).terminar(2)
    assert "linhas por passo: era 2 e agora é 1" in dito
    assert "continuando de checkpoint-" in Execucao(saida, phi3, *UM_SO).terminar()
    for (passo, nome, antes), (_, _, depois) in zip(curva(um_processo), curva(saida), strict=True):
        assert depois == pytest.approx(antes, abs=1e-4), (passo, nome)


def test_um_erro_do_primeiro_processo_e_dito_uma_vez(tmp_path: Path, phi3: Path) -> None:
    execucao = Execucao(tmp_path / "saida", phi3, "--arquivo-dados", "nada.jsonl", lancador=DOIS, **rapidos())
    assert execucao.processo.wait(timeout=120) != 0
    assert execucao.dito.count("o arquivo de dados nada.jsonl não existe") == 1


@pytest.mark.parametrize(("exemplos", "por_passo"), [(24, 2), (23, 4), (7, 3)])
def test_com_varios_processos_cada_exemplo_e_visto_uma_vez_por_passagem(
    exemplos: int, por_passo: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset

    monkeypatch.setenv("WORLD_SIZE", str(por_passo))
    treino = [{"input_ids": [1] * n, "labels": [1] * n, "tokens": n} for n in range(20, 20 + exemplos)]
    cfg = ft.ler_opcoes(["--max-length", "120", "--max-tokens-por-linha", "120"])
    linhas = ft.Linhas(Dataset.from_list(treino), cfg)
    quantas = len(linhas)
    for passagem in range(3):
        linhas.set_epoch(passagem)
        assert sorted(i for linha in linhas.linhas for i in linha) == list(range(exemplos))
        assert len(linhas) == quantas and quantas % por_passo == 0
