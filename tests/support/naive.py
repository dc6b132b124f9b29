"""What quantized weights stand for, worked out in the plainest way, and torch models that have such weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from dynamo_model import CPModel, LookAheadModel, MultiTokenModel
from dynamo_model.output import Output, logits_of
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.joint import JointHead
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, NONE
from support.checkpoints import all_graphs, all_nodes


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The last axis as `count` numbers, the lower half of a byte first."""
    if bits == 8:
        return packed[..., :count].astype(np.int64)
    out = np.zeros((*packed.shape[:-1], packed.shape[-1] * 2), np.int64)
    for i in range(packed.shape[-1]):
        out[..., 2 * i] = packed[..., i] % 16
        out[..., 2 * i + 1] = packed[..., i] // 16
    return out[..., :count]


def dequantize(
    packed: np.ndarray, scales: np.ndarray, zero_points: np.ndarray | None, bits: int, block: int, k: int
) -> np.ndarray:
    """The weight [N, K] that the arrays of a MatMulNBits stand for, input by input."""
    n, blocks = len(packed), -(-k // block)
    q = unpack(packed.reshape(n, blocks, -1), bits, block)
    scales = scales.reshape(n, blocks)
    if zero_points is None:
        zeros = np.full((n, blocks), 2 ** (bits - 1))
    else:
        zeros = unpack(zero_points.reshape(n, -1), bits, blocks)
    weight = np.zeros((n, k), np.float32)
    for at in range(k):
        block_of = at // block
        weight[:, at] = (q[:, block_of, at % block] - zeros[:, block_of]) * scales[:, block_of]
    return weight


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def graph_paths(bundle: Bundle) -> list[Path]:
    """Where the graphs of a bundle lie."""
    return [bundle.folder / name for name in bundle.graphs]


def initializers(*paths: Path) -> dict[str, np.ndarray]:
    """Every initializer of some graphs, those in branches among them; of the same name, they are of the first."""
    found: dict[str, np.ndarray] = {}
    for path in paths:
        for graph in all_graphs(onnx.load(path).graph):
            found = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer} | found
    return found


def stored_weights(*paths: Path) -> dict[str, np.ndarray]:
    """Every quantized weight [outputs, inputs] (of a look-up [ids, hidden]) by its name in the fp32 graphs."""
    found: dict[str, np.ndarray] = {}
    for path in paths:
        found = _stored_in(path) | found
    return found


def _stored_in(path: Path) -> dict[str, np.ndarray]:
    nodes, arrays = all_nodes(onnx.load(path).graph), initializers(path)
    made_by = {name: node for node in nodes for name in node.output}
    found = {}
    for node in nodes:
        given = attributes(node)
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            is_product = node.op_type == "MatMulNBits"
            data = node.input[1 if is_product else 0]
            name = made_by[data].input[0] if data in made_by else data
            block, bits = given["block_size"], given["bits"]
            k = given["K"] if is_product else arrays[name].shape[1] * 8 // bits
            zero_points = arrays[node.input[3]] if len(node.input) > 3 else None
            weight = dequantize(arrays[name], arrays[node.input[2]], zero_points, bits, block, k)
            found[name.rsplit(".q", 1)[0]] = weight
        elif node.op_type in ("MatMulInteger",):
            name = node.input[1]
            weight = arrays[name].astype(np.float32) * arrays[f"{name}.scales"]
            # The weight of a tied embedding is turned for its product, and stored besides the look-up's.
            found[f"{name.removesuffix('.q8')}.transposed"] = weight.T
    return found


DRAFT_EMBEDDING = "draft.embedding.weight"
MERGED = "heads.qkv.weight"


def fold_norms(model: MultiTokenModel) -> None:
    """Puts the weights of the norms in front of the heads' attentions into the projections, as a merged one has them.

    Of Llama's layers; what they compute stays.
    """
    with torch.no_grad():
        for layer in model.heads:
            norm: Any = layer.input_layernorm
            attention: Any = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)


def with_weights(model: torch.nn.Module, full: dict[str, np.ndarray], small: dict[str, np.ndarray]) -> int:
    """Puts the weights of a quantized graph into the torch model it came from; returns the numbers changed.

    Rows are found by their values, so nothing has to be known of names, packed projections or the order of rows. The
    embedding of a draft vocabulary has rows that the output embedding has as well, and is put beside it.

    Args:
        model: Changed in place.
        full: Initializers of the fp32 graphs.
        small: From `stored_weights`.
    """
    if MERGED in full:
        assert isinstance(model, MultiTokenModel)
        fold_norms(model)
    places = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            for i, row in enumerate(parameter.detach().numpy()):
                places[row.tobytes()] = name, i
    changed = 0
    if DRAFT_EMBEDDING in full:
        model.drafts = torch.from_numpy(full[DRAFT_EMBEDDING].T.copy())
    with torch.no_grad():
        for name, weight in small.items():
            if name == DRAFT_EMBEDDING:
                model.drafts = torch.from_numpy(weight)
                changed += weight.size
                continue
            before = full[name] if full[name].shape == weight.shape and "embed" in name else full[name].T
            for old, new in zip(np.ascontiguousarray(before), weight, strict=True):
                place, at = places[old.tobytes()]
                parameters[place][at] = torch.from_numpy(new)
                changed += len(new)
    return changed


def torch_outputs(model: torch.nn.Module, tokens: list[int]) -> dict[str, np.ndarray]:
    """What the torch model says at every token, by the graph's names of outputs; see `in_passes`."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        if isinstance(model, MultiTokenModel):
            first, *further = model.states(ids)
            found = {"logits": logits_of(model.base, first)[0].numpy()}
            drafts = getattr(model, "drafts", None)
            for head, state in enumerate(further, 2):
                told = torch.tensor([(tokens + [0] * head)[head - 1 :][: len(tokens)]])
                state = model.condition(head, state, told)
                logits = model.draft_logits(state) if drafts is None else Output.of(model.base)(state, drafts, None)
                found[f"logits_{head}"] = logits[0].numpy()
            return found
        if isinstance(model, CPModel):
            return {name: x[0].numpy() for name, x in zip(("logits", "gate", "factor_logits"), model(ids), strict=True)}
        if isinstance(model, LookAheadModel):
            return {"logits": model(ids)[0].numpy()}
        return {"logits": model(ids).logits[0].numpy()}


def outputs(bundle: Bundle, tokens: list[int], width: int | None = None) -> dict[str, np.ndarray]:
    """What a bundle says at every token, from passes over `width` tokens."""
    return in_passes(Session(bundle, provider="cpu", threads=1), tokens, width)


def in_passes(session: Session, tokens: list[int], width: int | None = None) -> dict[str, np.ndarray]:
    """See `outputs`; goes on behind what the session's cache holds.

    Conditioned heads are told the tokens that follow, and 0 where none do; of a draft vocabulary there are its words.
    """
    found: dict[str, list[np.ndarray]] = {}
    width = width or len(tokens)
    topology, drafter = session.bundle.topology, session.bundle.drafter
    words = slice(None) if drafter is None or drafter.vocabulary is None else list(drafter.vocabulary)
    for at in range(0, len(tokens), width):
        part = tokens[at : at + width]
        step = session.step(part, rows=ALL, heads=NONE if drafter is None else ALL)
        here = {"logits": step.logits()}
        for head in range(2, topology.n_heads + 1):
            told = (tokens + [0] * head)[at + head - 1 :][: len(part)]
            here[f"logits_{head}"] = step.ahead().logits(head - 2, told)[:, words]
        if isinstance(topology, JointHead):
            ahead = step.ahead()
            here |= {"gate": topology.gate(ahead), "factor_logits": topology.factors(ahead)}
        for name, array in here.items():
            found.setdefault(name, []).append(array.copy())
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖ours - theirs‖ / ‖theirs‖."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
