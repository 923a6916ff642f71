"""The export: what `transformers` writes, reads back and generates is the same model."""

import json

import pytest
import torch
from cases import ARMS, FULL, MODEL, MOE, NSA, build, grow, rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.model.pretrained import NSATrainConfig, NSATrainForCausalLM
from nsa_train.packing import Packing


def exported(folder, attention=NSA, **fields):
    """A trained-looking model, saved to `folder`."""
    trained = grow(build(attention, **fields))
    trained.head.set_prior(torch.arange(trained.config.vocab))
    for i, router in enumerate(trained.routers()):
        router.bias += torch.tensor([0.5, -0.2, -0.2, -0.1]) + 1e-4 * i  # not representable in bf16
    model = NSATrainForCausalLM(NSATrainConfig.of(trained.config, attention, MOE))
    model.transformer.load_state_dict(trained.state_dict())
    model.eval().save_pretrained(folder)
    return model


def reopened(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


TOKENS = rows()[0][:40].view(2, 20)


@pytest.mark.parametrize("arm", ["full", "nsa", "nsa-linear", "nsa-shared_kv", "nsa-random"])
def test_the_export_opens_with_equal_logits(tmp_path, arm):
    model = exported(tmp_path, ARMS[arm])
    with torch.no_grad():
        got, want = reopened(tmp_path)(TOKENS).logits, model(TOKENS).logits
    assert torch.equal(got, want)
    assert want.std() > 0.1


def test_logits_are_those_of_the_trained_transformer(tmp_path):
    model = exported(tmp_path)
    with torch.no_grad():
        want = model.transformer.logits(TOKENS.flatten(), Packing.from_lengths([20, 20]))
        assert torch.equal(model(TOKENS).logits, want.view(2, 20, -1))


def test_opening_restores_every_value_and_the_configuration(tmp_path):
    model = exported(tmp_path)
    again = reopened(tmp_path)
    want, got = model.state_dict(), again.state_dict()
    assert set(want) == set(got)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert again.config.build().config == MODEL
    assert again.transformer.layers[0].attention.config == NSA


def test_the_routers_bias_and_the_heads_prior_stay_fp32_in_a_bf16_model(tmp_path):
    model = exported(tmp_path)
    half = reopened(tmp_path, dtype=torch.bfloat16)
    for want, got in zip(model.transformer.routers(), half.transformer.routers(), strict=True):
        assert torch.equal(got.bias, want.bias)
        assert not torch.equal(got.bias, got.bias.bfloat16().float())
    assert torch.equal(half.transformer.head.prior, model.transformer.head.prior)
    fixed = ("router.bias", "head.prior")
    others = {name: x.dtype for name, x in half.state_dict().items() if not name.endswith(fixed)}
    assert set(others.values()) == {torch.bfloat16}, others
    with torch.no_grad():
        assert torch.isfinite(half(TOKENS).logits).all()


def test_random_blocks_are_those_of_the_run_in_every_dtype(tmp_path):
    model = exported(tmp_path, ARMS["nsa-random"], seed=3)
    draws = [layer.attention.draw for layer in model.transformer.layers]
    assert len({int(draw) for draw in draws} | {0}) == 1 + MODEL.layers
    for dtype in (torch.float32, torch.bfloat16):
        again = reopened(tmp_path, dtype=dtype).transformer
        for layer, draw in zip(again.layers, draws, strict=True):
            assert torch.equal(layer.attention.draw, draw)
            assert layer.attention.draw.dtype == torch.int64


def test_tied_weights_stay_tied(tmp_path):
    model = exported(tmp_path, tied_embeddings=True)
    again = reopened(tmp_path)
    assert again.transformer.head.weight is again.transformer.embed.weight
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", [FULL, NSA], ids=["full", "nsa"])
def test_padding_changes_no_token(tmp_path, attention, side):
    model = exported(tmp_path, attention)
    text, padding = TOKENS[:1, :13], torch.zeros(1, 7, dtype=torch.int64)
    parts = (padding, text) if side == "left" else (text, padding)
    mask = torch.cat([torch.full_like(part, part is text) for part in parts], 1)
    both = torch.cat([torch.cat(parts, 1), TOKENS[1:]])
    masks = torch.cat([mask, torch.ones(1, 20, dtype=torch.int64)])
    with torch.no_grad():
        got = model(both, attention_mask=masks).logits
        torch.testing.assert_close(got[0][mask[0].bool()], model(text).logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], model(TOKENS[1:]).logits[0], rtol=1e-4, atol=1e-5)


def test_what_would_be_read_otherwise_than_it_is_meant_is_refused(tmp_path):
    model = exported(tmp_path)
    mask = torch.ones_like(TOKENS)
    mask[1, 5:7] = 0
    with pytest.raises(ValueError, match="padding inside a row's text"):
        model(TOKENS, attention_mask=mask)
    with pytest.raises(ValueError, match="position_ids are not taken"):
        model(TOKENS, position_ids=torch.arange(TOKENS.shape[1])[None])


@pytest.mark.parametrize("attention", [FULL, NSA], ids=["full", "nsa"])
def test_autocast_changes_nothing(tmp_path, attention):
    model = exported(tmp_path, attention)
    want = model(TOKENS, labels=TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(TOKENS, labels=TOKENS)
        got.loss.backward()
    assert torch.equal(got.logits, want.logits)


def test_the_loss_is_that_of_the_next_token(tmp_path):
    model = exported(tmp_path)
    labels = TOKENS.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        out = model(TOKENS, labels=labels)
    log_p = out.logits.log_softmax(-1)
    want = [-float(log_p[b, t, TOKENS[b, t + 1]]) for b in range(2) for t in range(3, 19)]
    assert float(out.loss) == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_generation_appends_the_most_likely_tokens(tmp_path):
    model = exported(tmp_path)
    prompt = TOKENS[:1, :6]
    mask = torch.ones_like(prompt)
    got = model.generate(prompt, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
    want = prompt
    with torch.no_grad():
        for _ in range(5):
            want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)


def test_a_row_beyond_the_models_length_is_refused(tmp_path):
    model = exported(tmp_path)
    with pytest.raises(ValueError, match="257 tokens are beyond the model's max_seq_len=256"):
        model(torch.zeros(1, 257, dtype=torch.int64))


def test_an_export_of_another_version_is_refused_with_every_key(tmp_path):
    exported(tmp_path)
    keys = json.loads((tmp_path / "config.json").read_text())
    del keys["model"]["embedding_std"]
    keys["attention"]["span"] = 3
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError) as caught:
        reopened(tmp_path)
    said, *lines = str(caught.value).splitlines()
    assert said.startswith(f"{tmp_path}: another version of nsa_train wrote its config.json; use that one, or train")
    assert lines == ["  model.embedding_std: missing", "  attention.span: no such key"]


@pytest.mark.parametrize("tied", [False, True])
def test_an_export_without_some_tensors_is_refused_with_their_names(tmp_path, tied):
    exported(tmp_path, tied_embeddings=tied)
    lost = [f"transformer.{name}" for name in ("embed.weight", "layers.1.mlp.down", "layers.1.mlp.router.bias")]
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in lost:
        del weights[name]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(NsaTrainError) as caught:
        reopened(tmp_path)
    said, *lines = str(caught.value).splitlines()
    named = sorted([*lost, *(["transformer.head.weight"] if tied else [])])  # one tensor of two names
    assert said.startswith(f"{tmp_path}: {len(named)} of the model's tensors are not there; copy it from where")
    assert lines == [f"  {name}" for name in named]
