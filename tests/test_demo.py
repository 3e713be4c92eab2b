"""A demonstração inteira, como um novo usuário a executa."""

import sys
from pathlib import Path

from conftest import executar

import fine_tuning_saude as ft


def test_a_demonstracao_aprende_ao_menos_15_por_cento(demonstracao: tuple[Path, dict]) -> None:
    perda = demonstracao[1]["perda_validacao"]
    assert perda["depois"] <= 0.85 * perda["antes"]


def test_com_tudo_na_maquina_nada_tenta_usar_a_rede(demonstracao: tuple[Path, dict], tmp_path: Path) -> None:
    pasta = demonstracao[0].parent
    assert not (pasta / "tentativas.txt").exists(), (pasta / "tentativas.txt").read_text()
    # a recusa funciona: quem precisa da rede é barrado e fica escrito
    sem_rede = {"PYTHONPATH": str(pasta), "TENTATIVAS_DE_REDE": str(tmp_path / "tentativas.txt")}
    opcoes = ("--demo", "--dir-saida", tmp_path / "saida", "--modelo-base", "ninguem/nada")
    feito = executar(*opcoes, python=sys.executable, **sem_rede)
    assert feito.returncode == 2 and (tmp_path / "tentativas.txt").read_text()


def test_conversa_se_com_o_modelo_da_demonstracao_sem_dizer_a_pasta(demonstracao: tuple[Path, dict]) -> None:
    assert ft.TROCAS_DEMO["DIR_SAIDA"] == ft.ler_opcoes(["--demo", "--conversar"]).DIR_SAIDA
    feito = executar("--demo", "--perguntar", "O que é APS?", "--dir-saida", demonstracao[0])
    assert feito.returncode == 0 and len(feito.stdout.split()) > 3, feito.stderr


def test_os_dois_gguf_da_demonstracao_respondem(demonstracao: tuple[Path, dict]) -> None:
    arquivos = demonstracao[1]["gguf"]
    assert [a["tipo"] for a in arquivos] == ["q8_0", "q4_k_m"]
    assert [len(a["respostas"]) for a in arquivos] == [1, ft.TROCAS_DEMO["EXEMPLOS_PROVA"]]
    assert all(len(resposta.split()) >= 5 for a in arquivos for resposta in a["respostas"])


def test_o_gguf_servido_e_melhor_que_a_base_e_fiel_ao_modelo_final(demonstracao: tuple[Path, dict]) -> None:
    registro = demonstracao[1]
    base, final, _, maxima = registro["comparacao"]["perda"]
    assert final < base and maxima < 0
    for arquivo in registro["gguf"]:
        assert 0 < arquivo["kl"] <= ft.FIDELIDADE[arquivo["tipo"]][0] and 0.75 < arquivo["top1"] < 1
    assert registro["gguf"][0]["kl"] < registro["gguf"][1]["kl"]


def test_a_memoria_medida_e_a_do_gguf_e_nao_a_do_treino(demonstracao: tuple[Path, dict]) -> None:
    for arquivo in demonstracao[1]["gguf"]:
        assert arquivo["bytes"] < arquivo["memoria"] < arquivo["bytes"] + 400e6


def test_a_demonstracao_faz_conta_de_poucos_minutos(demonstracao: tuple[Path, dict]) -> None:
    # contagens, que não mudam com a máquina: tokens treinados, medidas da validação e tokens gerados na prova
    registro = demonstracao[1]
    curva, linha = registro["perda_validacao"]["curva"], registro["constantes"]["MAX_TOKENS_POR_LINHA"]
    passos, medidas = curva[-1][0], [passo for passo, nome, _ in curva if nome == "eval_perda"]
    assert passos * linha <= 30_000, f"{passos} passos de {linha} tokens"
    assert medidas[0] == 0 and medidas[-1] == passos and len(medidas) <= 3, medidas
    gerados = sum(len(arquivo["respostas"]) for arquivo in registro["gguf"]) + len(registro["respostas_da_base"])
    assert gerados * registro["constantes"]["MAX_NEW_TOKENS"] <= 1000
    # a prova de todos os arquivos lê menos respostas que o treino
    lidos = sum(medida["tokens"] for arquivo in registro["gguf"] for medida in arquivo["por_exemplo"])
    assert 0 < 2 * lidos <= passos * linha
