"""Interrupted quantization: finished layers are used again, or refused with the reason."""

import pytest
import torch
from torch import nn

from llmfast.errors import UserError
from llmfast.quantization import driver, resume
from llmfast.quantization.driver import quantize
from llmfast.quantization.methods import GptqSettings
from tiny_models import make, tokens

IDS = tokens(8, 64)
ORDERED = GptqSettings(act_order=True, static_groups=False)
CHOICES = [
    {"method": "nearest", "weights": "int8", "group_size": None},
    {"method": "gptq", "group_size": 32, "calibration": IDS, "gptq_settings": ORDERED},
    {"method": "awq", "group_size": 32, "calibration": IDS, "symmetric": False},
]
each_choice = pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c["method"])


def assert_same(found, wanted):
    assert found.weights.keys() == wanted.weights.keys() and found.fallbacks == wanted.fallbacks
    for name, w in wanted.weights.items():
        got = found.weights[name]
        assert (got.bits, got.group_size) == (w.bits, w.group_size)
        for part in ("codes", "scales", "zeros", "minima", "g_idx"):
            mine, its = getattr(got, part), getattr(w, part)
            assert (mine is None) == (its is None)
            assert mine is None or (mine.dtype == its.dtype and torch.equal(mine, its))
    assert found.folded.keys() == wanted.folded.keys()
    assert all(torch.equal(found.folded[name], value) for name, value in wanted.folded.items())


class Stop(Exception):
    pass


def interrupted_after(layers, model, folder, choice):
    def stop(what, done, total):
        if done == layers:
            raise Stop

    with pytest.raises(Stop):
        quantize(model, **choice, work=folder, on_progress=stop)


@each_choice
def test_it_goes_on_where_it_stopped(choice, tmp_path, monkeypatch):
    model = make("Llama", num_hidden_layers=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    wanted = quantize(model, **choice)
    folder = tmp_path / "work"
    interrupted_after(2, model, folder, choice)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert sorted(p.name for p in folder.glob("layer*")) == [
        f"layer-{i:04}.safetensors" for i in range(2)
    ]
    name = {"nearest": "round_to_nearest", "gptq": "_gptq_layer", "awq": "_awq_layer"}[
        choice["method"]
    ]
    worked, own = [], getattr(driver, name)
    monkeypatch.setattr(driver, name, lambda *args: worked.append(args[0]) or own(*args))
    seen = []
    found = quantize(model, **choice, work=folder, on_progress=lambda *a: seen.append(a[1:]))
    assert_same(found, wanted)
    assert seen == [(done, 3) for done in range(4)]
    assert len(worked) == (7 if choice["method"] == "nearest" else 1)  # of the last layer alone
    worked.clear()
    assert_same(quantize(model, **choice, work=folder), wanted)
    assert not worked


def test_a_file_that_was_cut_short_is_made_again(tmp_path):
    model = make("Llama")
    wanted = quantize(model, group_size=32, work=tmp_path / "work")
    path = tmp_path / "work/layer-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_same(quantize(model, group_size=32, work=tmp_path / "work"), wanted)
    assert_same(quantize(model, group_size=32, work=tmp_path / "work"), wanted)


def test_other_work_is_refused(tmp_path):
    model, folder = make("Llama", intermediate_size=128), tmp_path / "work"
    quantize(model, group_size=32, method="gptq", calibration=IDS, work=folder)
    other = make("Llama", intermediate_size=128)
    with torch.no_grad():
        nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    good = {"group_size": 32, "method": "gptq", "calibration": IDS}
    for changed, options, differs in (
        (other, {}, "model"),
        (make("Qwen3", intermediate_size=128), {}, "model"),
        (model, {"group_size": 64}, "scheme"),
        (model, {"weights": "int8"}, "scheme"),
        (model, {"method": "awq"}, "method"),
        (model, {"calibration": IDS.flip(0)}, "calibration"),
        (model, {"gptq_settings": GptqSettings(damping=0.1)}, "settings"),
    ):
        with pytest.raises(UserError, match=rf"of other work \(another {differs}\)"):
            quantize(changed, **good | options, work=folder)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    with pytest.raises(UserError, match="is there already, and no work folder"):
        quantize(model, group_size=32, work=full)
    assert [path.name for path in full.iterdir()] == ["mine"]
    with pytest.raises(UserError, match="cannot be used: No such file"):
        quantize(model, group_size=32, work=tmp_path / "no" / "work")


def test_a_full_disk_leaves_finished_layers(tmp_path, monkeypatch):
    model, folder, own = make("Llama"), tmp_path / "work", resume.save_file

    def full(tensors, path, **options):
        own(tensors, path, **options)
        if "0001" in path.name:
            raise OSError(28, "No space left on device")

    wanted = quantize(model, group_size=32)
    with monkeypatch.context() as patched:
        patched.setattr(resume, "save_file", full)
        with pytest.raises(UserError, match="cannot be used: No space left on device; layers"):
            quantize(model, group_size=32, work=folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["fingerprint.json", "layer-0000.safetensors"]
    assert_same(quantize(model, group_size=32, work=folder), wanted)
