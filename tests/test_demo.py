"""A demonstração inteira, como um novo usuário a executa."""

from pathlib import Path

import pytest
from conftest import executar_ate_o_fim


@pytest.fixture(scope="module")
def registro(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """O registro de `python fine_tuning_saude.py --demo`."""
    saida: Path = tmp_path_factory.mktemp("demo") / "saida"
    return executar_ate_o_fim("--demo", "--dir-saida", saida)


def test_a_demonstracao_aprende_ao_menos_10_por_cento(registro: dict) -> None:
    perda = registro["perda_validacao"]
    assert perda["depois"] <= 0.9 * perda["antes"]


def test_os_dois_gguf_da_demonstracao_respondem(registro: dict) -> None:
    assert [a["tipo"] for a in registro["gguf"]] == ["q8_0", "q4_k_m"]
    assert all(len(a["resposta"].split()) >= 5 for a in registro["gguf"])


def test_a_demonstracao_leva_no_maximo_oito_minutos(registro: dict) -> None:
    assert sum(etapa["segundos"] for etapa in registro["etapas"].values()) <= 8 * 60
