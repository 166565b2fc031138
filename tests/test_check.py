"""collapse-check: its numbers are Experiment 4's, and every exit code is reached by real inputs."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import SIZES, arm_of, save_tiny, unpacked_nf4
from safetensors.torch import load_file, save_file

import common
import effective_rank_analysis as analysis
from collapse.check import check, command, report
from collapse.config import LanguageModelConfig
from collapse.measures import against_base
from collapse.measures.layers import LayerStates, collapse_of, undisturbed
from collapse.models import finetuned
from collapse.models.pretrained import add_lora, load_causal_lm, whole_tokenizer
from collapse.report.model_records import Splits
from collapse.training import monitor
from collapse.utils.errors import UserError
from collapse.utils.files import ROOT

RNG = np.random.default_rng(0)
WORDS = ["good", "bad", "world", "sports", "business", "science", "word0", "word1"]
TEXTS = [" ".join(RNG.choice(WORDS, RNG.integers(2, 9))) + f" {i}" for i in range(150)]
LABELS = [i % 2 for i in range(150)]


def disturb(model, scale=0.3):
    """So that no adapter is without effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def adapter(llama, tmp_path_factory):
    """A LoRA adapter of a causal LM, saved; its folder and the model in memory."""
    settings = LanguageModelConfig(
        model=str(llama), quantization="none", compute_dtype="float32", lora_rank=4
    )
    adapters = disturb(add_lora(load_causal_lm(settings, torch.device("cpu")), settings), 0.1)
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    adapters.save_pretrained(folder)
    return folder, adapters, settings


def run_command(line, tmp_path, monkeypatch, capsys):
    """Exit code and what is printed."""
    monkeypatch.setattr(sys, "argv", ["collapse-check", *map(str, line), "--out", str(tmp_path)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return stopped.value.code, "".join(capsys.readouterr())


@pytest.fixture
def texts_file(tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    (tmp_path / "labels.txt").write_text("\n".join(map(str, LABELS)) + "\n")
    return tmp_path / "texts.txt"


def test_numbers_are_those_of_experiment_4_and_of_measure_every(adapter):
    folder, adapters, settings = adapter
    found = check(str(folder), None, TEXTS, LABELS, rows=140, max_length=12).record
    drawn = against_base.draw_texts(TEXTS, LABELS, whole_tokenizer(settings.model, None), 140, 12)
    model = common.wrap_causal_lm(adapters, arm_of(2), 2, "pooled", settings).eval()
    on_the_way = monitor.measures(model, drawn.split, drawn.split)
    record = analysis.measure(model, Splits(*[drawn.split] * 3), draws=2)
    now, base = found["last_layer"]["now"], found["last_layer"]["base"]
    assert found["rows"] == 140 and now["dims_95pct"] == record["dims_95pct"] > 3
    for name, value in now.items():
        assert value == pytest.approx(record[name], rel=1e-6), name
        if name in on_the_way:
            assert value == pytest.approx(on_the_way[name], rel=1e-6), name
    *inner, _, last = record["layers"]  # transformers leaves out the last one before its norm
    for layer, theirs in zip(found["layers"]["now"], [*inner, last], strict=True):
        assert layer["effective_rank"] == pytest.approx(theirs["effective_rank"], rel=1e-6)
    assert base["effective_rank"] != pytest.approx(now["effective_rank"], rel=1e-3)


def test_the_adapter_off_is_the_fresh_base_and_everything_stays_as_it_was(adapter, llama):
    folder, *_ = adapter
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = peft.PeftModel.from_pretrained(plain, folder, is_trainable=True)
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    model.train()
    model.base_model.model.model.norm.eval()

    def flags():
        modes = [module.training for module in model.modules()]
        return modes, [parameter.requires_grad for parameter in model.parameters()]

    before = flags()
    generator = torch.get_rng_state()
    tokenizer = whole_tokenizer(str(llama), None)
    off = check(model, None, TEXTS, tokenizer=tokenizer).record
    assert flags() == before
    assert torch.equal(generator, torch.get_rng_state())
    fresh = check(model, str(llama), TEXTS, tokenizer=tokenizer)
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
    whole = check(model, plain, TEXTS, tokenizer=tokenizer).record
    assert off["base"].endswith("(adapter off)") and fresh.record["base"] == str(llama)
    assert off["last_layer"] == fresh.record["last_layer"]
    assert whole["last_layer"] == off["last_layer"] and whole["base"] == str(llama)


def test_an_adapter_that_finds_no_place_in_its_base_is_refused(
    adapter, llama, texts_file, tmp_path, monkeypatch, capsys
):
    """Left out, it would leave the base as it is, and that has kept everything."""

    def run(place, *more):
        return run_command([place, "--texts", texts_file, *more], tmp_path, monkeypatch, capsys)

    other = transformers.LlamaConfig(**SIZES | {"hidden_size": 48, "num_attention_heads": 4})
    save_tiny(transformers.LlamaForCausalLM(other), tmp_path / "other")
    code, said = run(adapter[0], "--base", tmp_path / "other")
    assert code == 2 and "does not fit" in said and "lora_" in said

    compiled = tmp_path / "compiled"
    shutil.copytree(adapter[0], compiled)
    file = compiled / "adapter_model.safetensors"
    tensors = {
        k.replace("model.model.", "model._orig_mod.model."): v for k, v in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    code, said = run(compiled)
    assert code == 2 and "_orig_mod" in said and "save the adapter of the model inside" in said
    assert run(adapter[0])[0] in (0, 1)


def test_values_taken_out_of_the_base_make_it_be_loaded_anew(llama, tmp_path):
    """PiSSA moves the strongest directions of the base's weights into the adapter."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(llama)
    lora = peft.LoraConfig(
        r=4, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(plain, lora)
    model.peft_config["default"].base_model_name_or_path = str(llama)
    model.save_pretrained(tmp_path / "pissa")
    found = check(str(tmp_path / "pissa"), None, TEXTS).record
    same = check(str(llama), str(llama), TEXTS).record["last_layer"]["base"]
    assert found["base"] == str(llama) and found["last_layer"]["base"] == same


def test_trained_biases_make_the_base_be_loaded_anew(qwen, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained(qwen)
    lora = peft.LoraConfig(r=2, bias="all", target_modules=["q_proj"], task_type="CAUSAL_LM")
    disturb(peft.get_peft_model(plain, lora), 1.0).save_pretrained(tmp_path / "biased")
    found = check(str(tmp_path / "biased"), None, TEXTS).record
    same = check(str(qwen), str(qwen), TEXTS).record
    assert found["base"] == str(qwen)
    assert found["last_layer"]["base"] == same["last_layer"]["now"] == same["last_layer"]["base"]
    assert found["last_layer"]["now"] != found["last_layer"]["base"]


def test_four_bits_are_four_bits_on_both_sides(adapter):
    pytest.importorskip("bitsandbytes")
    found = check(str(adapter[0]), None, TEXTS, dtype="4bit").record
    assert found["dtype"] == {"base": "4bit", "now": "4bit"} and found["kept"] > 0.25
    plain = check(str(adapter[0]), None, TEXTS).record["last_layer"]["base"]
    assert found["last_layer"]["base"]["effective_rank"] != plain["effective_rank"]
    assert found["last_layer"]["base"]["lm_loss"] == pytest.approx(plain["lm_loss"], rel=0.05)


def test_four_bits_of_a_narrow_model_are_those_of_its_definition(tmp_path):
    """Of a width that is no multiple of a block's 64 values."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = SIZES | {"hidden_size": 48, "intermediate_size": 80}
    config = transformers.LlamaConfig(**sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    packed, plain = (
        finetuned.load_whole(str(tmp_path), dtype).eval() for dtype in ("4bit", "fp32")
    )
    layers = dict(plain.named_modules())
    for name, module in packed.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            layers[name].weight.data.copy_(unpacked_nf4(module))
    ids = torch.arange(20)[None]
    found, expected = (model(input_ids=ids).logits for model in (packed, plain))
    torch.testing.assert_close(found, expected)


def test_padding_side_and_batch_size_change_nothing_beyond_rounding(llama, monkeypatch):
    tokenizer = whole_tokenizer(str(llama), None)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    found = []
    for side, tokens in (("right", 1024), ("left", 1024), ("left", 1)):
        tokenizer.padding_side = side
        monkeypatch.setattr(against_base, "BATCH_TOKENS", tokens)
        found.append(check(model, model, TEXTS, LABELS, tokenizer).record["last_layer"]["now"])
    assert found[0] == found[1]
    for name, value in found[0].items():
        assert found[2][name] == pytest.approx(value, rel=1e-5), name


ARCHITECTURES = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 16}, "mistral": {}, "gemma2": {"head_dim": 16},
    "gpt2": {}, "gpt_neox": {}, "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64}, "phi": {},
    "bert": {}, "roberta": {}, "distilbert": {"dim": 64, "hidden_dim": 128}, "electra": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_last_hidden_state_is_what_the_backbone_gives_behind_its_last_norm(kind):
    sizes = SIZES | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | ARCHITECTURES[kind]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    ids = torch.randint(3, 300, (2, 9))
    with undisturbed(model):
        states = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        last = model.base_model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    torch.testing.assert_close(states.hidden_states[-1], last)


@pytest.mark.parametrize(("kind", "read"), [("llama", "last"), ("bert", "first")])
def test_a_classifier_is_measured_where_its_head_reads(kind, read, llama, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, num_labels=3)
    if kind == "llama":
        config.pad_token_id = None  # as models come; the classifier then takes rows one by one
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    save_tiny(model, tmp_path / "model")
    report = check(str(tmp_path / "model"), str(tmp_path / "model"), TEXTS, rows=130)
    assert report.record["read"] == read and "untested" in report.text()
    assert report.record["last_layer"]["now"]["lm_loss"] is None
    drawn = against_base.draw_texts(TEXTS, None, whole_tokenizer(str(llama), None), 130, 128)
    states = []
    with undisturbed(model):
        for ids in drawn.split.token_ids:
            output = model(ids[None], output_hidden_states=True).hidden_states[-1][0]
            states.append(output[-1 if read == "last" else 0])
    expected = collapse_of(torch.stack([torch.stack(states)] * 2).numpy(), None)
    found = report.record["last_layer"]["now"]
    assert found["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-4)
    assert found["effective_rank_without_first"] is None


def test_matrices_of_known_rank_and_the_verdicts_on_them():
    """Equal variance in k directions: rank k, and 95 % of the variance in 0.95 k of them."""
    n, texts = (
        256,
        against_base.draw_texts(TEXTS, None, lambda t: {"input_ids": [[1]] * len(t)}, 256, 9),
    )

    def numbers(k):
        pooled = np.zeros((1, 2, n, n), np.float32)
        waves = np.cos(np.pi * (np.arange(n)[:, None] + 0.5) * np.arange(1, k + 1) / n)
        pooled[..., :k] = waves
        states = LayerStates(pooled, np.ones((1, 2, n), np.float32))
        return against_base.numbers_of(states, None, texts, "mean")

    base = numbers(100)
    assert base["effective_rank"] == pytest.approx(100, rel=1e-5) and base["dims_95pct"] == 95
    for k, verdict in ((100, "kept"), (25, "kept"), (24, "collapsed"), (1, "collapsed")):
        now = numbers(k)
        assert against_base.share_kept(now, base) == pytest.approx(k / 100, abs=0.02)
        assert against_base.judge(now, base, texts)[0] == verdict, k
    nothing = base | {"dims_95pct": 0}
    assert against_base.judge(base, nothing, texts)[0] == "no verdict"
    assert against_base.judge(base | {"dims_95pct": None}, base, texts)[0] == "not finite"
    for classes, verdict in ((12, "kept"), (13, "no verdict")):
        some = dataclasses.replace(texts, classes=classes)
        assert against_base.judge(base, base, some)[0] == verdict


def collapsed_copy(folder, to, directions=3):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight[directions:] = 0
    shutil.copytree(folder, to)
    model.save_pretrained(to)
    return to


def test_exit_codes_by_real_inputs(llama, adapter, texts_file, tmp_path, monkeypatch, capsys):
    def run(*line):
        return run_command(line, tmp_path / "out", monkeypatch, capsys)

    labels = ("--labels", tmp_path / "labels.txt")
    code, said = run(adapter[0], "--texts", texts_file, *labels)
    assert code == 0 and "KEPT" in said and "within classes" in said and "(adapter off)" in said
    record = json.loads((tmp_path / "out/report.json").read_text())
    assert record["schema"] == 1 and record["rows"] == 150 and len(record["layers"]["now"]) == 3
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("<svg") == 2 and "KEPT" in page and "http" not in page

    dead = collapsed_copy(llama, tmp_path / "dead")
    code, said = run(dead, "--base", llama, "--texts", texts_file)
    assert code == 1 and "COLLAPSED" in said and "Lower the rate" in said
    (dead / "README.md").write_text(f"---\nbase_model: {llama}\n---\n")
    assert run(dead, "--texts", texts_file, "--json")[0] == 1

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    shutil.copytree(llama, tmp_path / "nan")
    model.save_pretrained(tmp_path / "nan")
    code, said = run(tmp_path / "nan", "--base", llama, "--texts", texts_file)
    assert code == 1 and "NOT FINITE" in said

    (tmp_path / "same.txt").write_text("the same text\n" * 300)
    code, said = run(llama, "--base", llama, "--texts", tmp_path / "same.txt")
    assert code == 3 and "NO VERDICT: 1 different texts" in said


def test_what_is_no_input_ends_in_one_sentence_and_2(
    llama, texts_file, tmp_path, monkeypatch, capsys
):
    def run(*line):
        code, said = run_command(line, tmp_path / "out", monkeypatch, capsys)
        assert code == 2
        return said

    assert "no such" in run(llama, "--texts", tmp_path / "none.txt").lower()
    assert "name it by --base" in run(llama, "--texts", texts_file)
    (tmp_path / "t.jsonl").write_text('{"body": "x"}\n')
    assert "--text-column" in run(llama, "--base", llama, "--texts", tmp_path / "t.jsonl")
    (tmp_path / "empty.txt").touch()
    assert "no text" in run(llama, "--base", llama, "--texts", tmp_path / "empty.txt")
    assert "one to each" in run(
        llama, "--base", llama, "--texts", texts_file, "--labels", tmp_path / "empty.txt"
    )
    monkeypatch.setattr("collapse.models.weights.use_cache_if_hub_is_silent", lambda: True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "hf auth login" in run("nobody/gated", "--base", llama, "--texts", texts_file)
    t5 = transformers.T5Config(vocab_size=320, d_model=16, d_ff=16, num_layers=1, num_heads=2)
    save_tiny(transformers.T5ForConditionalGeneration(t5), tmp_path / "t5")
    assert "encoder-decoder" in run(tmp_path / "t5", "--base", llama, "--texts", texts_file)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    lacking = {k: v for k, v in model.state_dict().items() if "up_proj" not in k}
    shutil.copytree(llama, tmp_path / "half")
    model.save_pretrained(tmp_path / "half", state_dict=lacking)
    assert "lacks weights" in run(tmp_path / "half", "--base", llama, "--texts", texts_file)


def test_layers_are_named_that_a_few_texts_dominate_now_and_not_in_the_base():
    """Some healthy models have many of them: the attention sink."""
    sides = {"base": (9.0, 1.1, 1.1, 9.0), "now": (1.1, 1.1, 9.0, 9.0)}
    layers = {side: [{"stable_rank": rank} for rank in ranks] for side, ranks in sides.items()}
    record = {"verdict": "kept", "why": "all is left.", "read": "mean", "layers": layers}
    said = report.Report(record).verdict()
    assert "dominate layer 0 (stable rank < 1.5), not in the base." in said
    layers["now"] = layers["base"]
    assert report.Report(record).verdict() == "KEPT: all is left."


def test_the_folder_of_a_training_names_the_adapters_in_it(
    adapter, texts_file, tmp_path, monkeypatch, capsys
):
    for name in ("best-adapter", "final-adapter"):
        shutil.copytree(adapter[0], tmp_path / "model1-seed42" / name)
    line = (tmp_path / "model1-seed42", "--texts", texts_file)
    code, said = run_command(line, tmp_path / "out", monkeypatch, capsys)
    assert code == 2 and "model1-seed42/final-adapter" in said and "best-adapter" in said


def test_states_are_pooled_as_the_training_pooled_them(adapter, tmp_path):
    for pooling, read in (({"pooling": "last"}, "last"), ({}, "mean")):
        run = tmp_path / read
        shutil.copytree(adapter[0], run / "model1-seed42" / "final-adapter")
        (run / "settings.json").write_text(json.dumps({"config": pooling}))
        found = check(str(run / "model1-seed42" / "final-adapter"), None, TEXTS)
        assert found.record["read"] == read


def test_models_in_memory_need_no_name(llama):
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    base.name_or_path = base.config.name_or_path = ""
    record = check(base, base, TEXTS, tokenizer=whole_tokenizer(str(llama), None)).record
    assert record["model"] == record["base"] == "(in memory)"
    assert record["kept"] == 1 and record["last_layer"]["now"].keys() >= {"dims_95pct"}
    assert not record["revision"]["base"]
    with pytest.raises(UserError, match="needs its tokenizer"):
        check(base, base, TEXTS)


def test_a_home_is_expanded(adapter, monkeypatch):
    monkeypatch.setenv("HOME", str(adapter[0].parent))
    assert check("~/adapter", None, TEXTS).record["model"] == "~/adapter (adapter)"


def test_the_libraries_below_add_nothing_to_what_it_says(adapter, texts_file, tmp_path):
    line = [sys.executable, "-c", "from collapse.check.command import main; main()", adapter[0]]
    line += ["--texts", texts_file, "--out", tmp_path]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("model ")


def test_texts_are_read_from_lines_tables_and_json(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "a.csv").write_text('text,n\none,1\n"two",2\n')
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.tsv").write_text("n\ttext\n1\tone\n2\ttwo\n")
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}]')
    for file in tmp_path.iterdir():
        assert command.read_texts(file) == (["one", "two"], None)
    assert command.read_texts(tmp_path / "a.csv", "n", "text") == (["1", "2"], ["one", "two"])
    with pytest.raises(UserError, match="name one with --text-column"):
        command.read_texts(tmp_path / "a.csv", "review")
    with pytest.raises(UserError, match="name one with --label-column"):
        command.read_texts(tmp_path / "a.tsv", "text", "stars")
    (tmp_path / "empty.csv").write_text("text,label\none,a\ntwo\n")
    with pytest.raises(UserError, match="the label is missing"):
        command.read_texts(tmp_path / "empty.csv", "text", "label")
    with pytest.raises(UserError, match="give --labels"):
        command.read_texts(tmp_path / "a.txt", "text", "stars")


def test_texts_are_read_as_excel_and_the_web_write_them(tmp_path):
    texts = ["a line\nand one\u2028more", "long " * 40_000]
    file = tmp_path / "excel.csv"
    file.write_text("\ufefftext\n" + "".join(f'"{text}"\n' for text in texts))
    assert command.read_texts(file)[0] == texts
    file.write_text("label,text\n1,good, really good\n")
    with pytest.raises(UserError, match="line 2: 3 columns where the header has 2"):
        command.read_texts(file)
    file.write_text('text\n"one\ntwo\n')
    with pytest.raises(UserError, match="line 3: unexpected end of data"):
        command.read_texts(file)
    (tmp_path / "a.txt").write_text("\ufeffone\u2028more\x0cpage\ntwo\n")
    assert command.read_texts(tmp_path / "a.txt")[0] == ["one\u2028more\x0cpage", "two"]


def test_a_draw_drops_copies_and_blanks_and_keeps_labels_beside_their_texts():
    def tokenizer(texts):
        return {"input_ids": [[len(text), 1, 2, 3] for text in texts]}

    texts = ["a", "bb", "a ", "", "ccc"]
    drawn = against_base.draw_texts(texts, ["x", "y", "y", "x", "x"], tokenizer, 10, 3)
    assert [ids.tolist() for ids in drawn.split.token_ids] == [[1, 1, 2], [2, 1, 2], [3, 1, 2]]
    assert drawn.split.labels.tolist() == [0, 1, 0] and drawn.classes == 2
    other = against_base.draw_texts(texts, ["x", "y", "y", "x", "y"], tokenizer, 10, 3)
    assert other.sha256 != drawn.sha256
    as_array = against_base.draw_texts(texts, np.array([0, 1, 1, 0, 0]), tokenizer, 10, 3)
    assert torch.equal(as_array.split.labels, drawn.split.labels)
    with pytest.raises(UserError, match="one to each"):
        against_base.draw_texts(texts, ["x"], tokenizer, 10, 3)


def test_heads_are_known_by_their_class(llama):
    assert finetuned.what_its_head_reads(torch.nn.Linear(1, 1)) == "mean"


def test_check_is_imported_with_the_core_dependencies_alone():
    barred = ["scipy", "sklearn", "matplotlib", "peft", "datasets", "tyro", "psutil", "cloudpickle"]
    barred += ["accelerate", "bitsandbytes", "submitit", "threadpoolctl", "gguf"]
    code = f"import sys\nsys.modules.update(dict.fromkeys({barred}))\nimport collapse.check"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
