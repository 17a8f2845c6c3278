"""What a program begins with: which parameters are read, which drawn, and in which dtype."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import vixml
from xmc_jax.config import ExportConfig, RunConfig
from xmc_jax.data.types import Prompts
from xmc_jax.models import fusion, hf
from xmc_jax.shipping import exporting
from xmc_jax.training import build, memory
from xmc_jax.training.run import Run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def decoder_fields(topics, tmp_path_factory) -> dict:
    fields = vixml.get_config("tiny_decoder").to_dict()
    data_dir = str(tmp_path_factory.mktemp("data"))
    fields["data"] |= {"dataset": "Topics-40", "raw_dir": str(topics), "data_dir": data_dir}
    fields["prime"]["free_vectors"] = 16
    fields["train"]["batch_size"] = 48
    return fields


@pytest.fixture(scope="module")
def decoder(decoder_fields):
    return build.run(RunConfig.from_dict(decoder_fields))


@pytest.fixture(scope="module")
def initial(decoder):
    return decoder.initial_state()


def paths(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_frozen_parameters_have_their_own_dtype(decoder):
    frozen, trained = paths(decoder.frozen), paths(decoder.abstract.params)
    assert {str(leaf.dtype) for leaf in frozen.values()} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in trained.values()} == {"float32"}
    assert not frozen.keys() & trained.keys()
    assert sum(path.endswith("lora_b") for path in trained) == 7


def test_parts_of_a_draw_are_those_of_the_whole(decoder_fields, decoder, initial):
    """What is drawn does not depend on what is frozen: a run may unfreeze without another start."""
    whole = copy.deepcopy(decoder_fields)
    whole["encoder"]["frozen_dtype"] = "float32"
    whole["optimizer"]["trainable"] = ((".*", True),)
    whole["optimizer"]["weight_decay"] = ((".*", 0.0),)
    everything = paths(build.run(RunConfig.from_dict(whole)).initial_state().params)
    trained, frozen = paths(initial.params), paths(decoder.frozen)
    assert everything.keys() == trained.keys() | frozen.keys()
    for path, leaf in trained.items():
        if path != "free_vectors":  # means of embeddings by rounded weights
            np.testing.assert_array_equal(leaf, everything[path], err_msg=path)
    for path, leaf in frozen.items():
        np.testing.assert_array_equal(leaf, everything[path].astype(jnp.bfloat16), err_msg=path)


def test_weights_are_read_into_the_part_that_holds_them(decoder_fields, decoder, initial, tmp_path):
    fields = copy.deepcopy(decoder_fields)
    folder = exporting.encoder(decoder, initial, tmp_path)
    fields["encoder"] |= {"backbone": str(folder), "init": "pretrained"}
    read = build.run(RunConfig.from_dict(fields))
    for path, leaf in paths(decoder.frozen).items():
        np.testing.assert_array_equal(paths(read.frozen)[path], leaf, err_msg=path)
    again = read.initial_state().params
    assert paths(again).keys() == paths(initial.params).keys()
    assert not np.any(again["backbone"]["layers"]["query"]["lora_b"])
    assert read.provenance()["backbone"]["sha256"] == hf.resolve(str(folder)).digest


def test_texts_must_be_as_the_backbone_takes_them(decoder_fields, decoder, fields):
    encoder_data = build.data(RunConfig.from_dict(fields))
    config = RunConfig.from_dict(decoder_fields)
    with pytest.raises(ValueError, match=r"expected texts without the tokenizer's special tokens"):
        Run(config, _with_tokens(encoder_data, lambda tokens: tokens % decoder.sizes.vocab_size))
    with pytest.raises(ValueError, match=r"expected texts with the tokenizer's special tokens"):
        Run(RunConfig.from_dict(fields), decoder.data)
    with pytest.raises(ValueError, match=r"expected no prefix and no suffix, which only decoders"):
        Run(RunConfig.from_dict(fields), encoder_data, Prompts(head=(1,)))


def _with_tokens(data, changed):
    """The same data with other tokens of its texts."""
    splits = {
        name: dataclasses.replace(split, tokens=changed(np.array(split.tokens)))
        for name in data.splits
        for split in [getattr(data, name)]
    }
    return dataclasses.replace(data, **splits)


def test_token_ids_that_occur_must_be_in_the_table(decoder_fields, decoder):
    """Published tokenizers have more entries than the table has rows; these do not occur."""
    config, rows = RunConfig.from_dict(decoder_fields), decoder.sizes.vocab_size
    tokenizer = decoder.data.manifest["tokenizer"] | {"vocab_size": rows + 1}
    data = dataclasses.replace(
        decoder.data, manifest=decoder.data.manifest | {"tokenizer": tokenizer}
    )
    Run(config, data, Prompts(tail=(rows - 1,)))
    message = rf"expected token ids below {rows}, the rows of .* table, found {rows} in"
    with pytest.raises(ValueError, match=f"{message} prompts"):
        Run(config, data, Prompts(tail=(rows,)))

    def beyond(tokens):
        tokens[-1, 0] = rows
        return tokens

    with pytest.raises(ValueError, match=f"{message} train; leave data.tokenizer"):
        Run(config, _with_tokens(data, beyond), Prompts(tail=(1,)))


def test_empty_texts_need_prompts(decoder_fields, decoder):
    lengths = np.array(decoder.data.test.lengths)
    lengths[3] = 0
    data = dataclasses.replace(
        decoder.data, test=dataclasses.replace(decoder.data.test, lengths=lengths)
    )
    config = RunConfig.from_dict(decoder_fields)
    with pytest.raises(ValueError, match=r"\['test'\] have texts without any token; set --config"):
        Run(config, data, fusion.NO_PROMPTS)
    assert Run(config, data, Prompts(tail=(7,))).layout.prompts.tail == (7,)


def test_encoders_refuse_prompts_by_name(fields):
    asked = fields | {"fusion": fields["fusion"] | {"suffix": "</s>"}}
    with pytest.raises(
        ValueError, match=r"fusion\.suffix: expected '', since encoders take no prom"
    ):
        build.run(RunConfig.from_dict(asked))
    asked = fields | {"fusion": fields["fusion"] | {"order": "text_image"}}
    with pytest.raises(ValueError, match=r"fusion\.order: expected 'image_text', as encoders take"):
        build.run(RunConfig.from_dict(asked))


def test_adapters_need_a_pretrained_model(decoder_fields, decoder, tmp_path):
    config = dataclasses.replace(decoder.config, export=ExportConfig("adapter"))
    decoder.config, whole = config, decoder.config
    try:
        with pytest.raises(ValueError, match=r"expected 'merged' for a backbone with random weigh"):
            exporting.encoder(decoder, decoder.abstract, tmp_path)
    finally:
        decoder.config = whole


def test_labels_that_a_step_has_no_memory_for_are_refused_at_the_start(fields, monkeypatch):
    """Against sampled labels, no such array is as large as all labels."""
    against_all = copy.deepcopy(fields)
    against_all["train"]["labels"] = "all"
    monkeypatch.setattr(memory, "of_device", lambda device: 10**9)
    build.run(RunConfig.from_dict(against_all))
    monkeypatch.setattr(memory, "of_device", lambda device: 10**6)
    build.run(RunConfig.from_dict(fields))
    with pytest.raises(ValueError, match=r"got 40: .* --config\.train\.labels=sampled$") as error:
        build.run(RunConfig.from_dict(against_all))
    assert "\n" not in str(error.value)


def test_more_steps_than_are_counted_are_refused_at_the_start(fields):
    endless = copy.deepcopy(fields)
    endless["train"]["epochs"] = 10**9
    with pytest.raises(ValueError, match=r"train\.epochs: expected at most .* got 1,000,000,000"):
        build.run(RunConfig.from_dict(endless))
