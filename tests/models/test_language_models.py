import math
from unittest.mock import patch

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy, linear, one_hot, pad
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

from spade_ext.models import SpadeConfig, SpadeForCausalLM, SpadeForMaskedLM, SpadeModel, vocabulary
from spade_ext.models.presets import LRA_TASKS, PRESETS

V, CUTOFFS = 40, (8, 20)
HEADS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "adaptive": {"adaptive_cutoffs": CUTOFFS, "adaptive_factor": 2, "scale_embedding": True},
}
all_heads = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())


def config(**options):
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "window": (3, 0),
        "ssm_d_state": 8,
        "ssm_n_ssm": 2,
        "pad_token_id": 1,
        "dropout": 0.0,
    }
    return SpadeConfig(**{**sizes, **options})


def language_model(**options):
    return SpadeForCausalLM(config(**options)).double()


def batch(B=3, L=20):
    return torch.randint(2, V, (B, L))


@pytest.fixture
def few_logits_at_once(monkeypatch):
    """Losses go over 2 tokens at a time."""
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 2 * V)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@all_heads
def test_loss_is_the_cross_entropy_of_the_logits(options, few_logits_at_once):
    model, ids = language_model(**options), batch()
    labels = ids.masked_fill(torch.rand(3, 20) < 0.3, -100)
    logits = model(ids).logits
    assert logits.shape == (3, 20, V)
    expected = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    output = model(ids, labels=labels)
    assert model.training and output.logits is None
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(gradients(model, output.loss), gradients(model, expected))
    count = (labels[:, 1:] != -100).sum()
    for items in (100, torch.tensor(100)):
        torch.testing.assert_close(model(ids, labels=labels, num_items_in_batch=items).loss, expected * count / 100)


@all_heads
@pytest.mark.parametrize("model_class", [SpadeForCausalLM, SpadeForMaskedLM])
def test_loss_is_zero_where_no_label_counts(options, model_class):
    window = (3, 0) if model_class is SpadeForCausalLM else (3, 3)
    model, ids = model_class(config(**options, window=window)), batch()
    nothing = torch.full_like(ids, -100)
    for items in (None, 0, torch.tensor(0)):
        loss = model(ids, labels=nothing, num_items_in_batch=items).loss
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients(model, loss).values())


@all_heads
def test_every_parameter_gets_a_gradient(options):
    model, ids = language_model(**options), batch(3, 30)
    for name, gradient in gradients(model, model(ids, labels=ids).loss).items():
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("model_class", [SpadeForCausalLM, SpadeForMaskedLM])
@pytest.mark.parametrize("name", ["plain", "adaptive"])
def test_evaluation_gives_logits_beside_the_loss(model_class, name, tmp_path):
    """Trainer hands them to compute_metrics; a loss-only evaluation of a decoder makes few of them."""
    window = (3, 0) if model_class is SpadeForCausalLM else (3, 3)
    model, ids = model_class(config(**HEADS[name], window=window)).eval(), batch()
    seen = []

    def metrics(prediction):
        seen.append(torch.from_numpy(prediction.predictions))
        return {}

    arguments = TrainingArguments(tmp_path, per_device_eval_batch_size=3, use_cpu=True, report_to="none")
    rows = [{"input_ids": row, "labels": row} for row in ids]
    loss = Trainer(model, arguments, eval_dataset=rows, compute_metrics=metrics).evaluate()["eval_loss"]
    output, logits = model(ids, labels=ids), model(ids).logits
    assert torch.equal(output.logits, logits) and torch.equal(model(ids, labels=ids, return_dict=False)[1], logits)
    torch.testing.assert_close(seen, [logits])
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)
    if model_class is SpadeForCausalLM:
        last = model(ids, labels=ids, logits_to_keep=1)
        assert torch.equal(last.loss, output.loss) and last.logits.shape == (3, 1, V)


def test_loss_keeps_no_logits(few_logits_at_once):
    """What the backward needs grows with the width, not with the vocabulary."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    model, ids = language_model(), batch()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids)
    assert max(kept) < ids.numel() * V


def test_adaptive_embedding_and_softmax_are_those_of_fairseq():
    """Spelled out from the published description, band by band."""
    model, ids = language_model(**HEADS["adaptive"]), batch()
    embedding = model.model.embed_tokens
    tables = [band.embedding.weight for band in embedding.bands]
    projections = [band.projection.weight for band in embedding.bands]
    assert [list(table.shape) for table in tables] == [[8, 16], [12, 8], [20, 4]]
    embedded = torch.cat([table @ projection.T for table, projection in zip(tables, projections, strict=True)])[ids]
    torch.testing.assert_close(embedding(ids), embedded)
    backbone = SpadeModel(config()).double()
    backbone.layers.load_state_dict(model.model.layers.state_dict())
    backbone.norm.load_state_dict(model.model.norm.state_dict())
    x = backbone(inputs_embeds=4 * embedded).last_hidden_state
    head = torch.cat([x @ tables[0].T, x @ model.adaptive_head.bands.weight.T], -1).log_softmax(-1)
    expected = [head[..., :8]]
    for index in (1, 2):
        tail = x @ projections[index] @ tables[index].T  # the projection's transpose, and the table's
        expected.append(tail.log_softmax(-1) + head[..., 7 + index, None])
    torch.testing.assert_close(model(ids).logits, torch.cat(expected, -1))


@pytest.mark.parametrize("wrong", [-1, V])
@all_heads
def test_ids_and_labels_out_of_the_vocabulary_are_refused(options, wrong):
    model, ids = language_model(**options), batch()
    labels = ids.clone()
    labels[1, 3] = wrong
    with pytest.raises(IndexError, match="index out of range in self"):
        model(labels)
    with pytest.raises(IndexError, match=f"^Target {wrong} is out of bounds"):
        model(ids, labels=labels)


def test_adaptive_weights_start_as_those_of_fairseq():
    model = SpadeForCausalLM(config(vocab_size=4000, hidden_size=128, adaptive_cutoffs=(1000, 2000), ssm_layers=()))
    for index, band in enumerate(model.model.embed_tokens.bands):
        dim = 128 // 4**index
        assert band.embedding.weight.shape[1] == dim
        assert band.embedding.weight.std().item() == pytest.approx(dim**-0.5, rel=0.03)
        assert not band.embedding.weight[1].any() and band.embedding.weight[0].any()
        assert band.projection.weight.abs().max() <= math.sqrt(6 / (128 + dim))
    assert [band.embedding.padding_idx for band in model.model.embed_tokens.bands] == [1, None, None]


def test_adaptive_dropout_is_before_the_head_and_in_the_tails():
    model, ids = language_model(**HEADS["adaptive"], adaptive_dropout=0.5).train(), batch()
    scales = []

    class Double(torch.nn.Module):
        def forward(self, x):
            scales.append(x.size(-1))
            return 2 * x

    model.adaptive_head.dropout = Double()
    loss = model(ids, labels=ids).loss
    assert scales == [16, 8, 4]
    x = 2 * model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
    embedding, targets = model.model.embed_tokens, ids[:, 1:].flatten()
    head = model.adaptive_head.head(x, embedding).log_softmax(-1)
    expected = -(head[:, :8] * one_hot(targets.clamp(max=8), 9)[:, :8]).sum()
    for index, (start, end) in enumerate(((8, 20), (20, V))):
        inside = (targets >= start) & (targets < end)
        band = embedding.bands[index + 1]
        tail = linear(2 * linear(x[inside], band.projection.weight.T), band.embedding.weight).log_softmax(-1)
        expected = expected - head[inside, 8 + index].sum() - tail.gather(1, targets[inside, None] - start).sum()
    torch.testing.assert_close(loss, expected / len(targets))


@all_heads
def test_save_and_load_twice(options, tmp_path):
    model, ids = SpadeForCausalLM(config(**options)).eval(), batch()
    for folder in ("first", "second"):
        model.save_pretrained(tmp_path / folder)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert isinstance(loaded, SpadeForCausalLM) and torch.equal(loaded(ids).logits, model(ids).logits)
        model = loaded
    tied = options.get("tie_word_embeddings", True) and "adaptive_cutoffs" not in options
    if "adaptive_cutoffs" not in options:
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    backbone = SpadeModel.from_pretrained(tmp_path / "first").eval()
    torch.testing.assert_close(backbone(ids).last_hidden_state, model.model(ids).last_hidden_state)


@all_heads
def test_weights_missing_from_a_checkpoint_are_those_of_a_new_model(options):
    from transformers import PreTrainedModel

    initialize = PreTrainedModel._initialize_weights

    def seeded(self, module, is_custom_code=False):
        torch.manual_seed(0)
        initialize(self, module, is_custom_code)

    with patch.object(PreTrainedModel, "_initialize_weights", seeded):
        new = SpadeForCausalLM(config(**options))
        loaded = SpadeForCausalLM.from_pretrained(None, config=config(**options), state_dict={})
    for name, value in new.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_resize_embeddings(tied):
    model = SpadeForCausalLM(config(tie_word_embeddings=tied))
    for size in (V + 10, V - 5):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size and model(batch() % size).logits.shape == (3, 20, size)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        assert model(batch() % size, labels=batch() % size).loss.isfinite()


def test_adaptive_embeddings_are_not_resized():
    model = language_model(**HEADS["adaptive"])
    with pytest.raises(ValueError, match=r"^adaptive_cutoffs is \(8, 20\), expected None to resize embeddings"):
        model.resize_token_embeddings(50)


@all_heads
def test_logits_to_keep(options):
    model, ids = language_model(**options), batch()
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 7])).logits, logits[:, [3, 7]])


def test_inputs_embeds_tuple_and_hidden_states():
    model, ids = language_model(**HEADS["adaptive"]), batch()
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 3 and output.hidden_states[0].shape == (3, 20, 16)
    assert torch.equal(model(ids, return_dict=False)[0], output.logits)
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, output.logits)


def packed(B=2):
    """Rows of documents of 5, 1 and 9 tokens: ids, their position_ids, their segment_ids, and begin and end."""
    position_ids = torch.tensor([[*range(5), 0, *range(9)]] * B)
    segment_ids = torch.tensor([[3] * 5 + [4] + [3] * 9] * B)
    return batch(B, 15), position_ids, segment_ids, ((0, 5), (5, 6), (6, 15))


def test_packed_documents_have_the_losses_of_those_alone():
    """The last token of a document predicts nothing, not the next document."""
    model = language_model()
    ids, position_ids, segment_ids, spans = packed(1)
    sums = sum(model(ids[:, a:b], labels=ids[:, a:b], num_items_in_batch=1).loss for a, b in spans)
    for packing in ({"position_ids": position_ids}, {"segment_ids": segment_ids}):
        torch.testing.assert_close(model(ids, labels=ids, **packing).loss, sums / 12)


@all_heads
def test_padding_predicts_nothing(options):
    """A row padded on the left, on the right and not at all has one loss: its first token is predicted by none."""
    model, ids = language_model(**options), batch(2, 9)
    labels, mask = ids.clone(), torch.ones_like(ids)
    alone = model(ids, labels=labels).loss
    for side in ((4, 0), (0, 4)):
        padded, real = pad(ids, side, value=1), pad(mask, side)
        for kind in (real, real.bool()):
            loss = model(padded, kind, labels=pad(labels, side, value=-100)).loss
            torch.testing.assert_close(loss, alone, rtol=1e-12, atol=1e-12)


POSITIONS = ["t5", "rope", "learned", "sinusoidal", None]


@pytest.mark.parametrize("position", POSITIONS)
def test_position_ids_that_restart_separate_documents(position):
    model = language_model(position=position, ssm_kind="s4d")
    ids, position_ids, segment_ids, spans = packed()
    logits = model(ids, position_ids=position_ids[:1]).logits
    torch.testing.assert_close(model(ids, segment_ids=segment_ids).logits, logits)
    for a, b in spans:
        torch.testing.assert_close(model(ids[:, a:b]).logits, logits[:, a:b])


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize("position", POSITIONS)
def test_position_ids_of_padded_rows_are_one_document(position, fill):
    """Those that generate() makes: padding of any number before the first real token, 0, and between real ones."""
    model = language_model(position=position)
    ids, mask = batch(2, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 0]])
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
    logits = model(ids, mask, position_ids=position_ids).logits
    torch.testing.assert_close(logits[mask == 1], model(ids, mask).logits[mask == 1])
    torch.testing.assert_close(logits[:1, 3:], model(ids[:1, 3:]).logits)


def test_learned_positions_are_those_of_documents():
    model = SpadeModel(config(position="learned", max_position_embeddings=9)).double()
    ids, position_ids, *_ = packed()
    assert model(ids, position_ids=position_ids).last_hidden_state.shape == (2, 15, 16)
    with pytest.raises(ValueError, match="^position_ids are from 0 to 14, expected 0 to 8, below max_position_embed"):
        model(ids)
    for wrong in (9, -1):
        few = torch.tensor([[0, 1, wrong]])
        match = f"^position_ids are from {few.min()} to {few.max()}, expected 0 to 8, below max_position_embeddings$"
        with pytest.raises(ValueError, match=match):
            model(ids[:, :3], position_ids=few)


@pytest.mark.parametrize("position", ["t5", "learned", "sinusoidal"])
def test_packed_rows_compile_as_one_graph(position):
    """Without a state space model."""
    torch.compiler.reset()  # the models share a limit of compilations
    model = language_model(position=position, ssm_layers=()).eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    ids, position_ids, *_ = packed()
    for each in (position_ids, torch.tensor([[*range(11)]] * 2)):
        tokens = ids[:, : each.size(1)]
        expected = model(tokens, position_ids=each, labels=tokens)
        actual = compiled(tokens, position_ids=each, labels=tokens)
        torch.testing.assert_close(actual.loss, expected.loss)
        torch.testing.assert_close(actual.logits, expected.logits)


def test_sinusoids_are_those_of_fairseq():
    model = SpadeModel(config(position="sinusoidal"))
    table = model.embed_positions(torch.tensor([[0, 5]]), counted=True)
    for row, number in ((table[0, 0], 2), (table[0, 1], 7)):
        angles = number * torch.exp(-math.log(10000) * torch.arange(8).double() / 7)
        torch.testing.assert_close(row, torch.cat([angles.sin(), angles.cos()]))


def test_errors_of_position_ids():
    model, ids = language_model(), batch()
    with pytest.raises(ValueError, match=r"^position_ids has shape \[2, 20\], expected \[3, 20\], \(B, L\)$"):
        model(ids, position_ids=torch.zeros(2, 20).long())
    with pytest.raises(TypeError, match=r"^position_ids is torch.float32, expected integers$"):
        model(ids, position_ids=torch.zeros(3, 20))


@pytest.mark.parametrize("mixer", ["window", "full"])
def test_generation_without_a_cache_is_greedy(mixer):
    window = (3, 0) if mixer == "window" else None
    model = SpadeForCausalLM(config(mixer=mixer, window=window, causal=True)).eval()
    ids = batch(2, 5)
    generated = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, expected)
    left = pad(ids, (3, 0), value=1)
    mask = pad(torch.ones_like(ids), (3, 0))
    padded = model.generate(left, attention_mask=mask, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(padded[:, 3:], expected)


def masked_model(**options):
    return SpadeForMaskedLM(config(window=(3, 3), **options)).double()


@pytest.mark.parametrize("name", ["plain", "adaptive"])
def test_masked_language_model(name, tmp_path, few_logits_at_once):
    model, ids = masked_model(**HEADS[name]), batch()
    labels = ids.masked_fill(torch.rand(3, 20) < 0.8, -100)
    logits = model(ids).logits
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss = model(ids, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(loaded, SpadeForMaskedLM)
    torch.testing.assert_close(loaded(ids).logits, logits)


def test_models_of_the_other_direction_are_refused():
    with pytest.raises(ValueError, match="^causal is False, expected True for SpadeForCausalLM$"):
        SpadeForCausalLM(config(window=(3, 3)))
    with pytest.raises(ValueError, match="^causal is True, expected False for SpadeForMaskedLM$"):
        SpadeForMaskedLM(config())
    with pytest.raises(ValueError, match="^input_size is 2, expected None for a language model$"):
        SpadeForCausalLM(config(input_size=2))


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_wikitext103_has_the_published_size():
    """fairseq's transformer_lm_wiki103, 246.9 M, with what the S4 of layer 0 adds."""
    with torch.device("meta"):
        model = SpadeForCausalLM(SpadeConfig.preset("wikitext103"))
    layer = model.model.layers[0].mixer
    added = sum(map(parameters, (layer.ssm, layer.ssm_norm, layer.attention_norm, layer.aggregate)))
    biases = 16 * 4 * 1024  # of q, k, v and o, which SPADE's attention has not
    table = 32 * 8
    assert parameters(model) - added - table + biases == pytest.approx(246.9e6, abs=0.05e6)
    assert layer.ssm.lr == 1e-3 and layer.attention.window == (511, 0) and layer.attention.dropout == 0.1
    assert model.model.layers[1].mixer.attention.position is None


@pytest.mark.parametrize(
    ("task", "published", "head"),
    [
        ("image", 2_839_096, 160 * 320 + 320 + 320 * 10),
        ("pathfinder", 1_386_874, 128 * 256 + 256 + 256 * 2),
        ("pathx", 381_948, 64 * 128 + 128 + 128 * 2),
    ],
)
def test_mega_has_the_published_size(task, published, head):
    """MEGA with full attention in Long Range Arena, without its classifier."""
    with torch.device("meta"):
        model = SpadeModel(SpadeConfig.preset(f"lra-{task}-mega-full"))
    assert parameters(model) == published - head


def test_presets_are_configurations():
    for name in PRESETS:
        assert SpadeConfig.preset(name, num_labels=3).num_labels == 3


@pytest.mark.parametrize("name", [name for name in PRESETS if "-pathx-" in name or "base" in name])
def test_presets_are_models(name):
    with torch.device("meta"):
        model = SpadeModel(SpadeConfig.preset(name, num_hidden_layers=2))
        assert model(inputs_embeds=torch.zeros(1, 300, model.config.hidden_size)).last_hidden_state.shape[1] == 300


def test_every_task_of_long_range_arena_has_every_model():
    models = {"spade-window", "spade-chunk", "mega-chunk", "mega-chunk-s4", "mega-full", "s4", "window", "full"}
    assert {f"lra-{task}-{model}" for task in LRA_TASKS for model in models} <= set(PRESETS)
    chunks = {(task, model): PRESETS[f"lra-{task}-{model}"].get("chunk_size") for task in LRA_TASKS for model in models}
    assert {pair for pair, size in chunks.items() if size == 4096} == {
        ("pathx", "mega-chunk"),
        ("pathx", "mega-chunk-s4"),
    }
    assert set(chunks.values()) == {None, 128, 4096}
    with pytest.raises(ValueError, match="^name is 'lra-image', expected one of wikitext103, "):
        SpadeConfig.preset("lra-image")
