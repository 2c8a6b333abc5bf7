"""Models of kinds that no family is of, by the names that megatron-core gives their tensors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from mcorefs.errors import MappingError
from mcorefs.mapping.choose import choose
from mcorefs.mapping.facts import gather
from mcorefs.mapping.families.glm4_moe import GLM4_MOE
from mcorefs.mapping.plan import plan
from mcorefs.mapping.reference import NO_REFERENCE, Reference
from mcorefs.model import Options, load
from mcorefs.views import View
from tests.test_plan import unread

SAVE = """
import sys, tempfile, torch
from argparse import Namespace
from pathlib import Path
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

kind, root = sys.argv[1], Path(sys.argv[2])
place = f"file://{tempfile.mkdtemp()}/rendezvous"
torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
config = TransformerConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True
)
if kind == "bert":
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    model = BertModel(config, 2, bert_layer_local_spec, 64, 8)
else:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model
    encoder = t5_spec.get_t5_encoder_with_local_block_spec(2)
    decoder = t5_spec.get_t5_decoder_with_local_block_spec(2)
    model = T5Model(config, config, encoder, decoder, 64, 8)
directory = root / "iter_0000001" / "mp_rank_00"
directory.mkdir(parents=True)
args = Namespace(num_layers=2, hidden_size=16, num_attention_heads=2)
state = {"model": model.state_dict(), "args": args, "checkpoint_version": 3.0, "iteration": 1}
torch.save(state, directory / "model_optim_rng.pt")
(root / "latest_checkpointed_iteration.txt").write_text("1")
"""


@pytest.mark.parametrize(
    ("kind", "what"), [("bert", "a BERT: an encoder"), ("t5", "a T5: an encoder and a decoder")]
)
def test_encoders_of_megatron_core(tmp_path: Path, kind: str, what: str) -> None:
    subprocess.run([sys.executable, "-c", SAVE, kind, tmp_path], check=True, timeout=120)
    with pytest.raises(MappingError, match=f"it is {what}, which is not supported yet"):
        load(tmp_path, Options())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("vision_projection.encoder.linear_fc1.weight", "a vision-language model"),
        ("model.visual.patch_embed.proj.weight", "a vision-language model"),
    ],
)
def test_others_by_their_names(name: str, what: str) -> None:
    tensors: Mapping[str, View] = {
        "embedding.word_embeddings.weight": unread((64, 16)),
        name: unread((16, 16)),
    }
    facts, _, _ = gather(tensors, {}, NO_REFERENCE)
    with pytest.raises(MappingError, match=f"it is {what}.*, which is not supported yet"):
        choose(tensors, facts, None, NO_REFERENCE)


SLIDING = {"window_size": [512, 0], "num_attention_heads": 96, "num_query_groups": 8}


@pytest.mark.parametrize(
    ("named", "reference", "hint"),
    [
        ("step3p7", NO_REFERENCE, None),
        (None, Reference({"model_type": "step3p7"}, "--hf-config"), "step3p5"),
        (None, NO_REFERENCE, "step3p7"),
    ],
)
def test_a_step_3_7_is_refused_by_name(
    named: str | None, reference: Reference, hint: str | None
) -> None:
    tensors = step35(full=8, sliding=12)
    facts, _, _ = gather(tensors, {}, NO_REFERENCE)
    with pytest.raises(MappingError, match=r"it is a step3p7, which is not supported yet: what se"):
        choose(tensors, facts, named, reference, hint)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head_wise_attn_gate", True),
        ("sliding_attention_setting", SLIDING),
        ("rotary_base_per_layer", [1e4, 5e6]),
    ],
)
def test_no_other_family_takes_its_arguments(name: str, value: object) -> None:
    tensors = step35(full=8, sliding=8)
    args = {"num_attention_heads": 8, "kv_channels": 4, name: value}
    facts, _, _ = gather(tensors, args, NO_REFERENCE)
    problems = plan(GLM4_MOE, tensors, facts)[1]
    assert any(f"{name}={value!r}, which Glm4MoeForCausalLM cannot" in p for p in problems)


def step35(full: int, sliding: int) -> Mapping[str, View]:
    """As Megatron-Bridge names them, two layers of which the second has a window and experts."""
    tensors = {"embedding.word_embeddings.weight": unread((64, 16))}
    for layer, heads in enumerate((full, sliding)):
        at = f"decoder.layers.{layer}.self_attention."
        tensors[at + "linear_qkv.weight"] = unread((heads * 4 + 2 * 2 * 4 + heads, 16))
        tensors[at + "linear_proj.weight"] = unread((16, heads * 4))
        tensors[at + "q_layernorm.weight"] = tensors[at + "k_layernorm.weight"] = unread((4,))
    tensors["decoder.layers.1.mlp.router.weight"] = unread((4, 16))
    return tensors
