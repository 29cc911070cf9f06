"""TransFusion's head as the runtime runs it: queries from the heatmap, one decoder after the other, raw boxes."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTPUTS = {"rot": "rot", "dim": "dim", "reg": "center", "height": "height", "vel": "vel"}


class LayerNormPlugin(torch.autograd.Function):
    """Layer normalisation over the last axis, written as the runtime's own node."""

    @staticmethod
    def forward(_: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """Normalise `x` (..., C)."""
        return F.layer_norm(x, x.shape[-1:], weight, bias, epsilon)

    @staticmethod
    def symbolic(graph: Any, x: Any, weight: Any, bias: Any, epsilon: float) -> Any:
        """Write the node that the runtime's plugin library implements."""
        out = graph.op("nv::CustomLayerNormalization", x, weight, bias, axis_i=-1, epsilon_f=epsilon)
        return out.setType(x.type())


class BBoxHead(nn.Module):
    """Decoded map to the last decoder layer's raw predictions.

    Args:
        model: the detector; its `heads.object` is used.
        layernorm_plugin: write layer normalisations as the runtime's plugin node.
    """

    def __init__(self, model: nn.Module, layernorm_plugin: bool = False):
        super().__init__()
        self.parent = model
        self.layernorm_plugin = layernorm_plugin
        self.register_buffer("classes_eye", torch.eye(model.heads["object"].num_classes))

    @property
    def output_names(self) -> list[str]:
        """The names of what `forward` returns, in order; a head without velocities has no `vel`."""
        predicted = self.parent.heads["object"].prediction_heads[-1].names
        return ["score", *(name for name, ours in OUTPUTS.items() if ours in predicted)]

    def forward(self, middle: Tensor) -> tuple[Tensor, ...]:
        """Map (B, C, X, Y) to `score` (B, classes, P) and the regressions (B, n, P); `reg` is the centre in cells."""
        head = self.parent.heads["object"]
        features = head.shared_conv(middle)
        scores = self._peaks(head.heatmap_head(features).sigmoid()).flatten(2)
        cells = scores.shape[2]
        top = scores.flatten(1).topk(head.num_proposals, dim=-1).indices
        labels = torch.div(top, cells, rounding_mode="trunc")
        cell = top - labels * cells

        flat = features.flatten(2)
        positions = head.bev_pos.expand(len(middle), -1, -1)
        one_hot = self.classes_eye[labels].transpose(1, 2)
        query = flat.gather(2, cell[:, None].expand(-1, flat.shape[1], -1)) + head.class_encoding(one_hot)
        query_pos = positions.gather(1, cell[..., None].expand(-1, -1, 2))
        query_scores = scores.gather(2, cell[:, None].expand(-1, head.num_classes, -1))

        query, key = query.transpose(1, 2), flat.transpose(1, 2)
        for decoder, heads in zip(head.decoder, head.prediction_heads, strict=True):
            query = self._decode(decoder, query, key, query_pos, positions)
            prediction = heads(query.transpose(1, 2))
            prediction["center"] = prediction["center"] + query_pos.transpose(1, 2)
            query_pos = prediction["center"].transpose(1, 2)
        score = prediction["heatmap"].sigmoid() * query_scores * one_hot
        return score, *(prediction[OUTPUTS[name]] for name in self.output_names[1:])

    def _peaks(self, heatmap: Tensor) -> Tensor:
        """Zero every cell of (B, classes, X, Y) that is no local maximum, except in classes of small objects."""
        head = self.parent.heads["object"]
        size = head.nms_kernel_size
        largest = F.pad(F.max_pool2d(heatmap, size, stride=1), [size // 2] * 4)
        small = torch.zeros(1, head.num_classes, 1, 1, dtype=torch.bool)
        small[:, list(head.point_classes)] = True
        return torch.where((heatmap == largest) | small, heatmap, torch.zeros(()))

    def _decode(self, layer: nn.Module, query: Tensor, key: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        """Refine queries (B, P, C) by attention among themselves and to `key` (B, K, C)."""
        query_embed = _embed(layer.self_posembed, query_pos)
        key = key + _embed(layer.cross_posembed, key_pos)
        q = query + query_embed
        query = self._norm(layer.norm1, query + attention(layer.self_attn, q, q))
        query = self._norm(layer.norm2, query + attention(layer.multihead_attn, query + query_embed, key))
        return self._norm(layer.norm3, query + layer.linear2(layer.activation(layer.linear1(query))))

    def _norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        if self.layernorm_plugin:
            return LayerNormPlugin.apply(x, norm.weight, norm.bias, norm.eps)
        return norm(x)


def _embed(embedding: nn.Module, positions: Tensor) -> Tensor:
    """Map positions (B, L, 2) to (B, L, C)."""
    return embedding.position_embedding_head(positions.transpose(1, 2)).transpose(1, 2)


def attention(layer: nn.MultiheadAttention, query: Tensor, key: Tensor) -> Tensor:
    """Multi-head attention (Vaswani et al., 2017) of `query` (B, P, C) to `key` (B, K, C), which are also the values.

    Equal tensors share one projection, as in the original graphs. Every size is a constant in the written graph.
    """
    channels, heads = layer.embed_dim, layer.num_heads
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    if query is key:
        q, k, v = F.linear(query, weight, bias).split(channels, dim=-1)
    else:
        q = F.linear(query, weight[:channels], bias[:channels])
        k, v = F.linear(key, weight[channels:], bias[channels:]).split(channels, dim=-1)
    batch, queries, size = len(query), query.shape[1], channels // heads
    q = (q * (1 / math.sqrt(size))).view(batch, queries, heads, size).transpose(1, 2)
    k = k.view(batch, -1, heads, size).permute(0, 2, 3, 1)
    v = v.view(batch, -1, heads, size).transpose(1, 2)
    attended = (q @ k).softmax(dim=-1) @ v
    return layer.out_proj(attended.transpose(1, 2).reshape(batch, queries, channels))
