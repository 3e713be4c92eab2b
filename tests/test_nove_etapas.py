"""As nove etapas sobre um Phi-3 minúsculo de vocabulário real, e o que elas deixaram no disco."""

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    CURTAS,
    DADOS,
    OPCOES_RAPIDAS,
    RAIZ,
    executar,
    executar_ate_o_fim,
    exemplos_reais,
    linhas_reais,
    preparar,
)
from modelos import TEMPLATES

import fine_tuning_saude as ft

PERGUNTA, RESPOSTA = "O que é a APS?", "É a porta de entrada do SUS."


@pytest.fixture(scope="module")
def tokenizer(phi3: Path):  # noqa: ANN201
    """O tokenizer como o programa o deixa na etapa 3."""
    return ft.etapa_3_modelo(preparar(phi3), ft.etapa_2_quantizacao("cpu"), treinar=False)[0]


def logits(modelo, ids: list[int]):  # noqa: ANN001, ANN201
    """Logits de uma sequência, em fp32: (posições, vocabulário)."""
    import torch

    with torch.no_grad():
        return modelo.eval()(input_ids=torch.tensor([ids])).logits[0].float()


def test_o_registro_traz_nove_etapas_constantes_versoes_e_somas_dos_arquivos(execucao_phi3: tuple[Path, dict]) -> None:
    saida, registro = execucao_phi3
    assert registro["situacao"] == "concluída"
    assert list(registro["etapas"]) == list("123456789")
    assert all(e["nome"] and e["segundos"] >= 0 for e in registro["etapas"].values())
    assert registro["constantes"]["LORA_R"] == ft.LORA_R and registro["constantes"]["LEARNING_RATE"] == 0.01
    assert registro["versoes"]["torch"] and registro["versoes"]["llama-cpp-python"]
    assert registro["sha256_dados"] == hashlib.sha256(CURTAS.read_bytes()).hexdigest()
    assert [a["arquivo"] for a in registro["gguf"]] == ["novo_modelo.gguf", "novo_modelo-q4_k_m.gguf"]
    for arquivo in registro["gguf"]:
        conteudo = (saida / arquivo["arquivo"]).read_bytes()
        assert hashlib.sha256(conteudo).hexdigest() == arquivo["sha256"]
        assert arquivo["respostas"][0].strip()
    assert registro["perda_validacao"]["depois"] < registro["perda_validacao"]["antes"]
    assert "passo" in (saida / "execucao.log").read_text(encoding="utf-8")
    assert list((saida / "checkpoints").glob("checkpoint-*/adapter_model.safetensors"))


def test_so_ficam_na_saida_os_arquivos_prometidos(execucao_phi3: tuple[Path, dict]) -> None:
    nomes = {a.name for a in execucao_phi3[0].iterdir()}
    assert nomes == {
        *("adaptador_lora", "checkpoints", "modelo_final", "novo_modelo.gguf", "novo_modelo-q4_k_m.gguf"),
        "novo_modelo-adaptador.gguf",
        *("Modelfile", "execucao.json", "execucao.log", "README.md", "perda.png", ".trava"),
    }


def test_o_adaptador_em_gguf_que_se_perdeu_nao_conta_como_pronto(execucao_phi3: tuple[Path, dict]) -> None:
    saida, registro = execucao_phi3
    adaptador, guardado = saida / "novo_modelo-adaptador.gguf", saida.with_name("guardado.gguf")
    assert ft.contar_prontas(saida, registro) == 9
    adaptador.rename(guardado)
    try:
        assert ft.contar_prontas(saida, registro) == 8
    finally:
        guardado.rename(adaptador)


def test_o_modelo_final_e_a_base_mais_o_adaptador(execucao_phi3: tuple[Path, dict], phi3: Path, tokenizer) -> None:  # noqa: ANN001
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saida, _ = execucao_phi3
    ids = tokenizer(ft.texto_do_prompt(tokenizer, PERGUNTA), add_special_tokens=False)["input_ids"]
    carregar = AutoModelForCausalLM.from_pretrained
    base = logits(carregar(phi3, dtype=torch.float32), ids)
    com_adaptador = PeftModel.from_pretrained(carregar(phi3, dtype=torch.float32), saida / "adaptador_lora")
    assert [m.r["default"] for m in com_adaptador.modules() if hasattr(m, "lora_A")] == [ft.LORA_R] * 8
    esperado = logits(com_adaptador, ids)
    final = logits(carregar(saida / "modelo_final", dtype=torch.float32), ids)
    efeito = (esperado - base).abs().mean()
    assert efeito > 0.01, "o treino não mudou o modelo, e o teste não provaria nada"
    # o que sobra de diferença é o arredondamento do modelo final em fp16
    assert (final - esperado).abs().mean() < 0.01 * efeito
    assert all(f.stat().st_size <= 2e9 for f in (saida / "modelo_final").glob("*.safetensors"))


def test_o_que_o_treino_mudou_pouco_nao_se_perde_na_soma(
    execucao_phi3: tuple[Path, dict],
    phi3: Path,
    tokenizer,  # noqa: ANN001
    tmp_path: Path,
) -> None:
    from safetensors.torch import load_file, save_file

    adaptador = shutil.copytree(execucao_phi3[0] / "adaptador_lora", tmp_path / "adaptador_lora")
    arquivo = adaptador / "adapter_model.safetensors"
    pesos, camada = load_file(arquivo), "model.layers.0.mlp.down_proj"
    a, b = (pesos[f"base_model.model.{camada}.lora_{parte}.weight"] for parte in "AB")
    pouco = 6e-5 / (2 * b @ a).std()  # meio degrau do bf16 entre pesos de 0,02
    save_file({nome: peso * (pouco if "lora_B" in nome else 1) for nome, peso in pesos.items()}, arquivo)
    exemplos = exemplos_reais(phi3, 2)
    ft.etapa_8_merge(ft.ler_opcoes(["--dir-saida", str(tmp_path)]), phi3, tokenizer, exemplos, exemplos)
    base, final = (load_file(p / "model.safetensors")[f"{camada}.weight"] for p in (phi3, tmp_path / "modelo_final"))
    esperado = 2 * pouco * b @ a  # LORA_ALPHA / LORA_R
    assert (final.float() - base.float() - esperado).norm() < 0.15 * esperado.norm()


def test_o_modelo_final_traz_tokenizer_template_e_parada(execucao_phi3: tuple[Path, dict], phi3: Path) -> None:
    final = execucao_phi3[0] / "modelo_final"
    assert (final / "tokenizer.model").read_bytes() == (phi3 / "tokenizer.model").read_bytes()
    assert (final / "chat_template.jinja").read_text() == (phi3 / "chat_template.jinja").read_text()
    geracao = json.loads((final / "generation_config.json").read_text())
    assert geracao["eos_token_id"] == [32000, 32001, 32007]


@pytest.mark.parametrize("arquivo", ["novo_modelo.gguf", "novo_modelo-q4_k_m.gguf"])
def test_o_gguf_tem_o_eos_a_parada_o_template_e_os_ids_do_treino(
    arquivo: str,
    execucao_phi3: tuple[Path, dict],
    tokenizer,  # noqa: ANN001
) -> None:
    import llama_cpp

    modelo = llama_cpp.Llama(str(execucao_phi3[0] / arquivo), n_ctx=256, verbose=False)
    assert modelo.token_eos() == 32000
    assert modelo.metadata["tokenizer.ggml.eot_token_id"] == "32007"
    assert modelo.metadata["phi3.attention.sliding_window"] == "2047"
    vocabulario = llama_cpp.llama_model_get_vocab(modelo._model.model)
    assert llama_cpp.llama_vocab_is_eog(vocabulario, 32007)
    assert modelo.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    for linha in linhas_reais(40):
        prompt = ft.texto_do_prompt(tokenizer, linha["input"])
        esperado = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        # add_bos=True é o que os servidores pedem; quem decide é o metadado do arquivo
        assert modelo.tokenize(prompt.encode(), add_bos=True, special=True) == esperado
    modelo.close()


def test_o_texto_treinado_e_o_do_chat_template_e_so_a_resposta_tem_rotulo(tokenizer) -> None:  # noqa: ANN001
    fim = ft.achar_fim_de_turno(tokenizer)
    assert fim == "<|end|>"
    prompt = ft.texto_do_prompt(tokenizer, PERGUNTA)
    assert prompt + RESPOSTA + fim == f"<|user|>\n{PERGUNTA}<|end|>\n<|assistant|>\n{RESPOSTA}<|end|>"
    exemplo = ft.codificar(tokenizer, fim, ft.Par(1, PERGUNTA, RESPOSTA))
    rotulados = [i for i in exemplo["labels"] if i != ft.IGNORADO]
    assert tokenizer.decode(rotulados) == f"{RESPOSTA}<|end|>"
    assert rotulados[-1] == 32007 and exemplo["input_ids"].count(32007) == 2
    assert exemplo["input_ids"][-len(rotulados) :] == rotulados
    assert len(exemplo["labels"]) == len(exemplo["input_ids"])


def test_o_pad_do_modelo_final_nao_e_eos_nem_fim_de_turno(tokenizer) -> None:  # noqa: ANN001
    # aqui nada é preenchido; mas quem treinasse de novo com pad igual ao eos mascararia o fim da resposta
    assert tokenizer.pad_token_id not in (tokenizer.eos_token_id, 32007, None)
    assert tokenizer.padding_side == "right"


def test_avaliar_no_meio_do_treino_nao_muda_os_gradientes(phi3: Path) -> None:
    import torch

    cfg = ft.ler_opcoes(["--lora-dropout", "0"])
    tokenizer, base = ft.etapa_3_modelo(preparar(phi3), ft.etapa_2_quantizacao("cpu"))
    modelo = ft.etapa_4_lora(cfg, base)
    torch.manual_seed(0)
    for nome, parametro in modelo.named_parameters():
        if "lora_B" in nome:  # com B em zero, como nasce, o gradiente de A também seria zero
            torch.nn.init.normal_(parametro, std=0.02)
    exemplo = ft.codificar(tokenizer, "<|end|>", ft.Par(1, PERGUNTA, RESPOSTA))
    lote = ft.juntar_exemplos([exemplo])

    def gradientes() -> dict[str, torch.Tensor]:
        modelo.train()
        modelo.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            modelo(**lote).loss.backward()
        return {n: p.grad.clone() for n, p in modelo.named_parameters() if p.requires_grad}

    antes = gradientes()
    modelo.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        modelo(**lote)
    depois = gradientes()
    assert len(antes) == 16 and all(g.abs().max() > 0 for g in antes.values())
    for nome, gradiente in antes.items():
        assert torch.allclose(gradiente, depois[nome], rtol=1e-3, atol=1e-6), nome


def test_lora_no_phi3_mini_tem_25_165_824_parametros_treinaveis() -> None:
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(Phi3Config(), dtype=torch.bfloat16)
    modelo = ft.etapa_4_lora(ft.ler_opcoes([]), base)
    assert modelo.get_nb_trainable_parameters() == (25_165_824, 3_846_245_376)


def test_exemplo_longo_e_erro_com_linha_e_tamanho_e_nunca_e_cortado(tmp_path: Path, phi3: Path) -> None:
    linhas = DADOS.read_text(encoding="utf-8").splitlines()[:6]
    linhas[3] = json.dumps({"input": "Conte tudo.", "output": "palavra " * 400})
    (tmp_path / "dados.jsonl").write_text("\n".join(linhas), encoding="utf-8")
    opcoes = ["--arquivo-dados", "dados.jsonl", "--modelo-base", phi3, "--treinar-na-cpu", "--max-length", "300"]
    feito = executar(*opcoes, pasta=tmp_path)
    assert feito.returncode == 2
    assert re.search(r"dados\.jsonl:4: \d{3,} tokens", feito.stderr)
    assert "[2/9]" not in feito.stdout


def test_base_sem_tokenizer_model_e_recusada_antes_do_treino(tmp_path: Path, phi3: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(phi3, base)
    (base / "tokenizer.model").unlink()
    feito = executar("--modelo-base", base, "--dir-saida", tmp_path / "saida", *OPCOES_RAPIDAS)
    assert feito.returncode == 1
    assert "tokenizer.model" in feito.stderr and "[2/9]" not in feito.stdout
    assert "Traceback" not in feito.stderr.split("disse:")[0]


def test_conversor_que_falha_depois_do_treino_da_saida_diferente_de_zero(tmp_path: Path, phi3: Path) -> None:
    pasta = tmp_path / "llama.cpp"
    pasta.mkdir()
    verdadeiro = RAIZ / "llama.cpp" / "convert_hf_to_gguf.py"
    (pasta / "convert_hf_to_gguf.py").write_text(
        "import runpy, sys\n"
        "if 'base' not in ' '.join(sys.argv[3:]):\n    sys.exit('disco cheio de mentira')\n"
        f"sys.argv[0] = {str(verdadeiro)!r}\n"
        f"sys.path.insert(0, {str(verdadeiro.parent)!r})\n"
        f"runpy.run_path({str(verdadeiro)!r}, run_name='__main__')\n"
    )
    saida = tmp_path / "saida"
    feito = executar("--modelo-base", phi3, "--dir-saida", saida, "--dir-llama-cpp", pasta, *OPCOES_RAPIDAS)
    assert feito.returncode == 1, feito.stdout + feito.stderr
    assert "código 1" in feito.stderr and "disco cheio de mentira" in feito.stderr
    assert "Concluído" not in feito.stdout
    assert json.loads((saida / "execucao.json").read_text())["situacao"] == "falhou"
    assert (saida / "adaptador_lora" / "adapter_model.safetensors").is_file()
    assert not list(saida.glob("novo_modelo*"))


def test_o_modelfile_gravado_e_o_que_se_prova_com_o_ollama_e_para_nos_dois_tokens_de_fim(
    execucao_phi3: tuple[Path, dict],
    tokenizer,  # noqa: ANN001
) -> None:
    modelfile = (execucao_phi3[0] / "Modelfile").read_text(encoding="utf-8")
    cfg = ft.ler_opcoes(OPCOES_RAPIDAS)
    assert modelfile == ft.escrever_modelfile("novo_modelo-q4_k_m.gguf", cfg, tokenizer)
    assert modelfile.startswith(f"FROM ./novo_modelo-q4_k_m.gguf\nPARAMETER num_ctx {cfg.MAX_LENGTH}\nPARAMETER temp")
    assert re.findall(r'PARAMETER stop "(.+)"', modelfile) == ["<|end|>", "<|endoftext|>"]


# {família: (o modelo de `modelos`, o que o llama.cpp diz que é, o fim de turno, o que entra no template ao ser fixado)}
FAMILIAS = {
    "llama": (("llama_ou_qwen", "llama", "llama_com_data"), "llama", "<|eot_id|>", "26 Jul 2024"),
    "qwen": (("llama_ou_qwen", "qwen", "qwen_que_pensa"), "qwen2", "<|im_end|>", "{{- '<think>"),
    "gemma3": (("gemma3",), "gemma3", "<end_of_turn>", ""),
    "gemma3_com_visao": (("gemma3", True), "gemma3", "<end_of_turn>", ""),
    "mistral": (("mistral",), "llama", "</s>", ""),
}


@pytest.mark.parametrize("familia", FAMILIAS)
def test_as_nove_etapas_valem_para_outras_familias_e_seus_templates(
    familia: str, tmp_path: Path, construido: Callable[..., Path]
) -> None:
    import llama_cpp
    from safetensors.torch import load_file

    modelo, arquitetura, fim, fixado = FAMILIAS[familia]
    base, saida, dados = construido(*modelo), tmp_path / "saida", tmp_path / "dados.jsonl"
    # as 24 mais curtas: cada uma cabe na janela do Gemma, e as que dividem uma linha, juntas, não
    curtas = sorted(linhas_reais(), key=lambda linha: len(linha["input"] + linha["output"]))[:24]
    dados.write_text("\n".join(map(json.dumps, curtas)), encoding="utf-8")
    opcoes = [*OPCOES_RAPIDAS, "--arquivo-dados", dados, "--max-length", "192", "--max-tokens-por-linha", "384"]
    opcoes += ["--quantizacoes-gguf", "q8_0", "--exemplos-prova", "3", "--exemplos-imatrix", "2"]
    registro = executar_ate_o_fim("--modelo-base", base, "--dir-saida", saida, *opcoes)
    assert registro["situacao"] == "concluída" and list(registro["etapas"]) == list("123456789")
    assert registro["perda_validacao"]["depois"] < registro["perda_validacao"]["antes"]
    tokenizer = ft.carregar_tokenizer(base)
    assert ft.achar_fim_de_turno(tokenizer) == fim
    assert ft.inicio_da_resposta(tokenizer) == (" " if familia == "mistral" else "")
    modelo = llama_cpp.Llama(str(saida / "novo_modelo.gguf"), n_ctx=256, verbose=False)
    assert modelo.metadata["general.architecture"] == arquitetura
    assert modelo.metadata.get("gemma3.attention.sliding_window") == ("192" if arquitetura == "gemma3" else None)
    assert modelo.metadata["tokenizer.ggml.eot_token_id"] == str(tokenizer.convert_tokens_to_ids(fim))
    # o tokenizer entregue é o da base, arquivo por arquivo, com o template treinado e o pad
    for arquivo in (a for a in base.iterdir() if "token" in a.name and a.name != "tokenizer_config.json"):
        assert (saida / "modelo_final" / arquivo.name).read_bytes() == arquivo.read_bytes()
    da_base, final = (json.loads((p / "tokenizer_config.json").read_bytes()) for p in (base, saida / "modelo_final"))
    mudou = {nome for nome in da_base.keys() | final.keys() if da_base.get(nome) != final.get(nome)}
    assert mudou <= {"pad_token", "padding_side", "chat_template"}
    # o template que vai no GGUF é o treinado, sem o dia de hoje e com o pensamento já fechado no prompt
    servido, da_base = modelo.metadata["tokenizer.chat_template"], (base / "chat_template.jinja").read_text("utf-8")
    assert servido == tokenizer.chat_template and "strftime_now" not in servido
    assert fixado in servido and (servido == da_base) == (fixado in da_base) == (not fixado)
    assert not [nome for nome in load_file(saida / "adaptador_lora" / "adapter_model.safetensors") if "vision" in nome]
    # os embeddings destes modelos são também a saída, e no GGUF, como na base, vêm uma vez só; só o texto vai nele
    pesos = {n: peso for n, peso in load_file(base / "model.safetensors").items() if not re.search("vision|multi_", n)}
    assert llama_cpp.llama_model_n_params(modelo._model.model) == sum(peso.numel() for peso in pesos.values())
    assert "lm_head.weight" not in pesos
    modelo.close()
    modelfile = (saida / "Modelfile").read_text(encoding="utf-8")
    assert modelfile == ft.escrever_modelfile("novo_modelo.gguf", ft.ler_opcoes([*map(str, opcoes)]), tokenizer)
    assert fim in re.findall(r'PARAMETER stop "(.+)"', modelfile)
    assert "TEMPLATE" in modelfile


@pytest.fixture(scope="module")
def de_familia(construido: Callable[..., Path]) -> Callable[[str], Any]:
    """Função que dá o tokenizer de uma família ("llama" ou "qwen"), dos modelos que as nove etapas já pedem."""
    from transformers import AutoTokenizer

    nomes = {"llama": "llama_com_data", "qwen": "qwen_que_pensa"}
    return functools.cache(
        lambda familia: AutoTokenizer.from_pretrained(construido("llama_ou_qwen", familia, nomes[familia]))
    )


@pytest.mark.parametrize("nome", TEMPLATES)
def test_o_prompt_treinado_e_o_servido_em_cada_forma_de_template(nome: str, de_familia: Callable[[str], Any]) -> None:
    import copy

    tokenizer = copy.deepcopy(de_familia(nome.partition("_")[0]))
    tokenizer.chat_template = TEMPLATES[nome]
    ft.fixar_template(tokenizer)
    inicio, fim = ft.inicio_da_resposta(tokenizer), ft.achar_fim_de_turno(tokenizer)
    exemplo = ft.codificar(tokenizer, fim, ft.Par(1, PERGUNTA, RESPOSTA), inicio)
    servido = tokenizer.apply_chat_template(
        [{"role": "user", "content": PERGUNTA}], tokenize=False, add_generation_prompt=True
    )
    rotulados = [i for i in exemplo["labels"] if i != ft.IGNORADO]
    assert exemplo["prompt"] == servido
    assert exemplo["input_ids"][: -len(rotulados)] == tokenizer(servido, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(rotulados) == f"{inicio}{RESPOSTA}{fim}" and fim in ("<|eot_id|>", "<|im_end|>")
    assert inicio == (" " if nome == "llama_com_espaco" else "")
    assert servido.endswith("<think>\n\n</think>\n\n") == nome.startswith("qwen")
    assert "generation %}" not in tokenizer.chat_template and "strftime_now" not in tokenizer.chat_template


def test_template_que_nao_encerra_a_resposta_e_recusado_com_o_que_ele_escreve(tokenizer) -> None:  # noqa: ANN001
    import copy

    outro = copy.deepcopy(tokenizer)
    outro.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(ft.ErroDeUso, match=r"escreve '\\nuser: ' depois da resposta, sem um token especial"):
        ft.achar_fim_de_turno(outro)


@pytest.mark.parametrize("sempre", [False, True])  # o do GLM-4, e o do GLM-Edge, que abre a resposta mesmo sem ela
def test_turno_que_so_se_fecha_onde_o_outro_comeca_acaba_nele(sempre: bool, tokenizer) -> None:  # noqa: ANN001
    import copy

    outro = copy.deepcopy(tokenizer)
    outro.chat_template = "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}{% endfor %}"
    outro.chat_template += "{% if " + ("true" if sempre else "add_generation_prompt") + " %}{{ '<|assistant|>' }}"
    outro.chat_template += "{% endif %}"
    assert ft.achar_fim_de_turno(outro) == "<|user|>"


def test_pensamento_aberto_com_outro_nome_tambem_se_fecha_no_prompt(tokenizer) -> None:  # noqa: ANN001
    import copy

    outro = copy.deepcopy(tokenizer)
    outro.chat_template += "{% if add_generation_prompt %}{{ '<thought>\n' }}{% endif %}"
    ft.fixar_template(outro)
    assert ft.texto_do_prompt(outro, "oi").endswith("<|assistant|>\n<thought>\n\n</thought>\n\n")


SEM_PERGUNTA = {
    "{{ messages[0]['content'][0]['text'].x }}<|end|>": "não escreve uma pergunta e uma resposta",
    "{{ tools | length + messages }}": "não escreve uma pergunta e uma resposta",
    "{% for m in messages if m['role'] != 'user' %}{{ m['content'] }}<|end|>{% endfor %}": "não escreve a pergunta",
}


@pytest.mark.parametrize("template", SEM_PERGUNTA)
def test_template_que_nao_escreve_a_pergunta_e_recusado_numa_frase(template: str, phi3: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(phi3, tmp_path / "base"))
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    with pytest.raises(ft.ErroDeUso, match=SEM_PERGUNTA[template]):
        ft.carregar_tokenizer(base)


def test_sem_token_especial_livre_o_pad_e_um_que_os_dados_nao_usam(tokenizer) -> None:  # noqa: ANN001
    import copy

    outro, pares = copy.deepcopy(tokenizer), [ft.Par(i, d["input"], d["output"]) for i, d in enumerate(linhas_reais(9))]
    outro.chat_template = "".join(outro.added_tokens_encoder) + outro.chat_template
    outro.unk_token = outro.eos_token
    pad = outro.convert_tokens_to_ids(ft.escolher_pad(outro, pares))
    usados = {i for par in pares for i in outro(f"{par.pergunta}\n{par.resposta}")["input_ids"]}
    assert pad not in usados | set(outro.added_tokens_encoder.values())


HIBRIDOS = {  # {a classe da config: (o que a faz minúscula, o que nela não é atenção)}
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, "Conv1d, conv"),
    "FalconH1Config": ({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "Conv1d, hybrid"),
}


@pytest.mark.parametrize("hibrido", HIBRIDOS)
def test_modelo_em_que_um_exemplo_veria_os_outros_e_recusado_na_estimativa(hibrido: str) -> None:
    import transformers

    pequeno = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    opcoes, dito = HIBRIDOS[hibrido]
    config = getattr(transformers, hibrido)(**pequeno, num_hidden_layers=2, **opcoes)
    with pytest.raises(ft.ErroDeUso, match=rf"camadas \({dito}\) em que um exemplo veria os outros"):
        ft.estimar_memoria(ft.ler_opcoes([]), config, "cpu")
    # o Gemma 2 não tem sdpa, e é de atenção
    config = transformers.Gemma2Config(**pequeno, num_hidden_layers=2)
    assert ft.estimar_memoria(ft.ler_opcoes([]), config, "cpu")[0] > 0


ALVOS = {"q_proj,v_proj": "q_proj, v_proj", "qkv_proj,embed_tokens": "embed_tokens", "inexistente": "inexistente"}
ALVOS |= {".*(q_proj|embed_tokens)": "model.embed_tokens", ".*self_attn": "model.layers.0.self_attn", "x.*": r"x\.\*"}


@pytest.mark.parametrize("alvos", ALVOS)
def test_camada_que_o_modelo_base_nao_tem_e_recusada_com_as_que_ele_tem(alvos: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Phi3Config

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(Phi3Config(num_hidden_layers=1), dtype=torch.bfloat16)
    with pytest.raises(ft.ErroDeUso, match=rf"traz {ALVOS[alvos]}, e as camadas lineares .*down_proj.*qkv_proj"):
        ft.etapa_4_lora(ft.ler_opcoes(["--lora-target-modules", alvos]), base)
    assert ft.conferir_alvos("qkv_proj,o_proj", base) == ["qkv_proj", "o_proj"]
    assert ft.conferir_alvos(["qkv_proj", "o_proj"], base) == ["qkv_proj", "o_proj"]
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight  # presas uma à outra: somar numa mudaria a outra
    for presos in ("qkv_proj,lm_head", ".*(qkv_proj|lm_head)"):
        with pytest.raises(ft.ErroDeUso, match="traz lm_head"):
            ft.conferir_alvos(presos, base)
    assert ft.conferir_alvos(r".*\.(qkv_proj|o_proj)", base) == r".*\.(qkv_proj|o_proj)"
    with pytest.raises(ft.ErroDeUso, match="não é uma lista de nomes nem uma expressão regular"):
        ft.conferir_alvos("*.qkv_proj", base)


BASES = {
    "em_4_bits": ({"quantization_config": {"load_in_4bit": True}}, (), "já está quantizada"),
    "so_bin": ({}, ("pytorch_model.bin",), "só tem pesos .bin"),
    "gguf": (None, ("modelo.gguf",), "é um GGUF"),
    "adaptador": (None, ("adapter_config.json", "adapter_model.bin"), "é só um adaptador LoRA"),
    "vazia": (None, (), "está vazia"),
    "sem_tokenizer": (None, (), "não tem os arquivos do tokenizer"),
}


@pytest.mark.parametrize("caso", BASES)
def test_base_que_nao_serve_e_recusada_com_o_motivo_certo(caso: str, phi3: Path, tmp_path: Path) -> None:
    config, arquivos, dito = BASES[caso]
    base = tmp_path / "base"
    if caso in ("em_4_bits", "sem_tokenizer"):
        outros = shutil.ignore_patterns("tokenizer*" if caso == "sem_tokenizer" else "")
        shutil.copytree(phi3, base, ignore=outros)
    base.mkdir(exist_ok=True)
    if config is not None:
        (base / "config.json").write_text(json.dumps({"model_type": "phi3"} | config))
    for arquivo in arquivos:
        (base / arquivo).write_bytes(b"{}")
    with pytest.raises(ft.ErroDeUso, match=dito) as erro:
        ft.exigir_base_inteira(base)
    assert len(str(erro.value).splitlines()) == 1


def test_base_dentro_da_pasta_de_saida_e_recusada(execucao_phi3: tuple[Path, dict]) -> None:
    final = execucao_phi3[0] / "modelo_final"
    cfg = ft.ler_opcoes(["--modelo-base", str(final), "--dir-saida", str(execucao_phi3[0])])
    with pytest.raises(ft.ErroDeUso, match="está dentro de DIR_SAIDA"):
        ft.localizar_modelo_base(cfg)


def test_prompt_que_o_llama_cpp_leria_de_outro_modo_e_dito_com_a_linha_antes_do_treino(
    phi3: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(phi3, base)
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    fusoes = tokenizer["model"]["merges"]
    fusoes.insert(0, fusoes.pop(fusoes.index(["▁", "▁"])))  # na ordem dos ids, como o transformers 5 as refaz
    (base / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    linhas = linhas_reais(12)
    linhas[6]["input"] = "Qual  é o prazo de retorno?"  # dois espaços
    (tmp_path / "dados.jsonl").write_text("\n".join(map(json.dumps, linhas)), encoding="utf-8")
    opcoes = [*OPCOES_RAPIDAS, "--arquivo-dados", "dados.jsonl", "--modelo-base", base, "--fracao-validacao", "0.3"]
    feito = executar(*opcoes, "--max-length", "512", "--max-tokens-por-linha", "512", pasta=tmp_path)
    assert feito.returncode == 2, feito.stdout + feito.stderr
    assert "dados.jsonl:7: o llama.cpp lê" in feito.stderr and "Qual  é" in feito.stderr
    assert "[2/9]" not in feito.stdout
