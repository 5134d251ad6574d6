"""Encoder-decoders predict from caches what they predict from all tokens at once."""

import pytest
import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from spade_ext.models import SpadeCache, SpadeForConditionalGeneration
from spade_ext.models.cross_attention import CrossAttention

from .test_encoder_decoder import EOS, PAD, START, V, all_decoders, batch, config, sided
from .test_encoder_decoder import seq2seq as untrained


def seq2seq(**options):
    """One whose tokens depend on its source and on those before, with large weights beside the embedding."""
    model = untrained(**options)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".ssm." not in name and "embed_tokens" not in name:
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=6, do_sample=False, **options)


def greedy(model, ids, prompt, tokens, mask=None):
    """What `generate` does for one row, by forwards over all tokens."""
    for _ in range(tokens):
        logits = model(ids, mask, prompt, use_cache=False).logits[:, -1]
        prompt = torch.cat([prompt, logits.argmax(-1, keepdim=True)], 1)
        if prompt[0, -1] == EOS:
            break
    return prompt


def caches(model):
    part = model.config.decoder_config
    return EncoderDecoderCache(SpadeCache(part), DynamicCache(config=part))


@all_decoders
@pytest.mark.parametrize("side", ["left", "right"])
def test_pieces_are_the_whole(options, side):
    """Of padded rows, token by token and by pieces, the source given once."""
    model, ids, target = seq2seq(**options), batch(), batch(3, 15)
    mask, target_mask = sided((14, 6, 1), 14, side), sided((15, 9, 3), 15, side)
    expected = model(ids, mask, target, target_mask, use_cache=False).logits
    with torch.no_grad():
        for sizes in ((4, *[1] * 11), (1, 7, 7)):
            cache, logits = caches(model), []
            encoded = model.get_encoder()(ids, mask)
            for piece, real in zip(target.split(sizes, 1), target_mask.split(sizes, 1), strict=True):
                inputs = {"decoder_input_ids": piece, "decoder_attention_mask": real, "encoder_outputs": encoded}
                output = model(attention_mask=mask, cache=cache, **inputs)
                assert output.cache is cache
                logits.append(output.logits)
            assert cache.get_seq_length() == 15
            torch.testing.assert_close(torch.cat(logits, 1)[target_mask], expected[target_mask])


@all_decoders
@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_generation_of_padded_sources(options, side):
    model, ids, mask = seq2seq(**options), batch(), sided((14, 6, 1), 14, side)
    generated = generate(model, ids, attention_mask=mask)
    assert torch.equal(generate(model, ids, attention_mask=mask, use_cache=False), generated)
    for row in range(3):
        expected = greedy(model, ids[row : row + 1, mask[row]], torch.tensor([[START]]), 6)[0]
        assert generated[row, : len(expected)].tolist() == expected.tolist()
        assert (generated[row, len(expected) :] == PAD).all()


@all_decoders
def test_generation_goes_on_from_padded_prompts(options):
    model, ids = seq2seq(**options), batch(2)
    prompt, mask = batch(2, 6), sided((6, 3), 6, "left")
    prompt[0, 0] = prompt[1, 3] = START
    prompt = prompt.masked_fill(~mask, PAD)
    generated = generate(model, ids, decoder_input_ids=prompt, decoder_attention_mask=mask.long())
    for row in range(2):
        expected = greedy(model, ids[row : row + 1], prompt[row : row + 1, mask[row]], 6)[0]
        begin = 6 - mask[row].sum()
        assert generated[row, begin : begin + len(expected)].tolist() == expected.tolist()


@all_decoders
def test_beams_and_samples_do_not_need_a_cache(options):
    model, ids, mask = seq2seq(**options), batch(2), sided((14, 6), 14, "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True}
    with_cache = generate(model, ids, attention_mask=mask, **beams)
    without = generate(model, ids, attention_mask=mask, use_cache=False, **beams)
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores)
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        samples.append(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=True, use_cache=use_cache))
    assert torch.equal(*samples)


@all_decoders
def test_the_source_is_read_once(options):
    """The encoder runs once, and so do the keys and values of each layer's cross-attention."""
    model, ids, calls = seq2seq(**options), batch(2), []
    model.get_encoder().register_forward_hook(lambda *_: calls.append("encoder"))
    layers = [module for module in model.modules() if isinstance(module, CrossAttention)]
    for layer in layers:
        layer.kv.register_forward_hook(lambda *_: calls.append("kv"))
    model.generation_config.eos_token_id = None
    generated = generate(model, ids, num_beams=2, return_dict_in_generate=True)
    assert generated.sequences.shape == (2, 7) and sorted(calls) == ["encoder"] + ["kv"] * len(layers)
    cache = generated.cache
    assert isinstance(cache, EncoderDecoderCache) and isinstance(cache.self_attention_cache, SpadeCache)
    assert [layer.keys.shape for layer in cache.cross_attention_cache.layers] == [(4, 2, 14, 8)] * len(layers)
    assert all(cache.is_updated.values()) and len(cache) == len(layers)


def test_a_local_decoders_cache_does_not_grow():
    model, ids, sizes = seq2seq(decoder="local"), batch(2), []
    model.generation_config.eos_token_id = None
    for tokens in (5, 15):
        generated = model.generate(ids, max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True)
        sizes.append(generated.cache.self_attention_cache.nbytes)
        assert generated.sequences.shape == (2, tokens + 1)
    assert sizes[0] == sizes[1]


@all_decoders
def test_generation_goes_on_from_its_cache(options):
    """3 tokens and then 3 are 6."""
    model, ids = seq2seq(**options), batch(2)
    model.generation_config.eos_token_id = None
    whole = generate(model, ids)
    begun = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    rest = {"decoder_input_ids": begun.sequences, "cache": begun.cache}
    rest["decoder_attention_mask"] = torch.ones_like(begun.sequences)  # by which transformers knows the tokens before
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, **rest), whole)


def test_a_cache_is_made_where_one_is_asked_for():
    model, ids = seq2seq(), batch(2)
    assert isinstance(model(ids, decoder_input_ids=ids).cache, EncoderDecoderCache)
    assert model(ids, decoder_input_ids=ids, use_cache=False).cache is None
    assert model(ids, labels=ids).cache is None
    assert model.train()(ids, decoder_input_ids=ids).cache is None
    with pytest.warns(FutureWarning, match="past_key_values"):
        cache = caches(model)
        assert model(ids, decoder_input_ids=ids, past_key_values=cache).cache is cache


def test_caches_of_others_are_refused():
    model, ids = seq2seq(), batch(2)
    with pytest.raises(TypeError, match="^cache is a DynamicCache, expected"):
        model(ids, decoder_input_ids=ids, cache=DynamicCache())


def test_eager_attention_generates_the_same():
    model, ids, mask = seq2seq(decoder="local"), batch(), sided((14, 6, 1), 14, "right")
    expected = generate(model, ids, attention_mask=mask)
    model.set_attn_implementation("eager")
    output = generate(model, ids, attention_mask=mask, return_dict_in_generate=True, output_attentions=True)
    assert torch.equal(output.sequences, expected)
    assert output.cross_attentions[0][0].shape == (3, 2, 1, 14) and len(output.encoder_attentions) == 2


def test_steps_of_a_local_decoder_compile_once():
    """One graph, with shapes that do not change."""
    torch.compiler.reset()
    model, ids = seq2seq(decoder="local"), batch(2)
    model.generation_config.eos_token_id = None
    options = {"attention_mask": sided((14, 6), 14, "left"), "max_new_tokens": 9, "do_sample": False}
    expected = model.generate(ids, **options)
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    compiling._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(model.generate(ids, compile_config=compiling, **options), expected)


@pytest.mark.parametrize("decoder", ["full", "local"])
def test_trainer_predicts_by_generation(decoder, tmp_path):
    """Which makes no logits in training, and hands none but those of labels to metrics."""
    model = SpadeForConditionalGeneration(config(decoder=decoder))
    arguments = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    evaluation = {"per_device_eval_batch_size": 2, "predict_with_generate": True, "generation_max_length": 5}
    rows = [{"input_ids": row, "labels": row[:7]} for row in batch(4)]
    trainer = Seq2SeqTrainer(model, Seq2SeqTrainingArguments(tmp_path, **arguments, **evaluation), train_dataset=rows)
    trainer.train()
    predicted = trainer.predict(rows)
    ids = torch.stack([row["input_ids"] for row in rows])
    expected = model.eval().generate(ids, max_length=5, num_beams=1)
    assert predicted.predictions[:, :5].tolist() == expected.tolist()  # then the trainer's padding
    loss = model(ids, labels=ids[:, :7]).loss.item()
    assert predicted.metrics["test_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.args.predict_with_generate = False
    assert trainer.predict(rows).predictions.shape == (4, 7, V)


def test_special_tokens_reach_the_generation_config():
    model = seq2seq()
    expected = {"decoder_start_token_id": START, "bos_token_id": 0, "eos_token_id": EOS, "pad_token_id": PAD}
    assert {name: getattr(model.generation_config, name) for name in expected} == expected
    assert GenerationConfig.from_model_config(config()).decoder_start_token_id == START
