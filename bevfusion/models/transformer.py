"""The decoder layer and prediction heads of TransFusion (Bai et al., 2022)."""

from collections.abc import Mapping
from itertools import pairwise

import torch.nn.functional as F
from mmcv.cnn import ConvModule, build_conv_layer
from torch import Tensor, nn


class PositionEmbedding(nn.Module):
    """Learned embedding of positions on the BEV grid."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.position_embedding_head = nn.Sequential(
            nn.Conv1d(inputs, channels, 1),
            nn.BatchNorm1d(channels),
            nn.ReLU(inplace=True),
            nn.Conv1d(channels, channels, 1),
        )

    def forward(self, positions: Tensor) -> Tensor:
        """Map positions (B, P, inputs) to (B, channels, P)."""
        return self.position_embedding_head(positions.transpose(1, 2).contiguous())


class TransformerDecoderLayer(nn.Module):
    """Self-attention among queries, cross-attention to the BEV map, feed-forward; normalised after each."""

    def __init__(self, channels: int, heads: int, feedforward: int, dropout: float, activation: str):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, heads, dropout)
        self.multihead_attn = nn.MultiheadAttention(channels, heads, dropout)
        self.linear1 = nn.Linear(channels, feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(3))
        self.activation = {"relu": F.relu, "gelu": F.gelu}[activation]
        self.self_posembed = PositionEmbedding(2, channels)
        self.cross_posembed = PositionEmbedding(2, channels)

    def forward(self, query: Tensor, key: Tensor, query_pos: Tensor, key_pos: Tensor) -> Tensor:
        """Refine queries.

        Args:
            query: (B, C, P); key: (B, C, K).
            query_pos: (B, P, 2); key_pos: (B, K, 2), in BEV cells.

        Returns:
            (B, C, P).
        """
        query, key = query.permute(2, 0, 1), key.permute(2, 0, 1)
        query_embed = self.self_posembed(query_pos).permute(2, 0, 1)
        key = key + self.cross_posembed(key_pos).permute(2, 0, 1)

        q = query + query_embed
        query = self.norm1(query + self.dropout1(self.self_attn(q, q, q, need_weights=False)[0]))
        attended = self.multihead_attn(query + query_embed, key, key, need_weights=False)[0]
        query = self.norm2(query + self.dropout2(attended))
        fed = self.linear2(self.dropout(self.activation(self.linear1(query))))
        return self.norm3(query + self.dropout3(fed)).permute(1, 2, 0)


class PredictionHeads(nn.Module):
    """One stack of 1x1 convolutions per regressed quantity.

    Args:
        channels: query channels.
        heads: name -> (outputs, number of convolutions).
        hidden: channels between the convolutions.
    """

    def __init__(
        self, channels: int, heads: Mapping[str, tuple[int, int]], conv_cfg: dict, norm_cfg: dict, hidden: int = 64
    ):
        super().__init__()
        self.names = tuple(heads)
        for name, (outputs, convs) in heads.items():
            widths = [channels] + [hidden] * (convs - 1)
            layers = [ConvModule(a, b, 1, conv_cfg=conv_cfg, norm_cfg=norm_cfg) for a, b in pairwise(widths)]
            self.add_module(name, nn.Sequential(*layers, build_conv_layer(conv_cfg, widths[-1], outputs, 1, bias=True)))
        nn.init.constant_(self.heatmap[-1].bias, -2.19)  # a prior foreground probability of 0.1 (Lin et al., 2017)

    def forward(self, query: Tensor) -> dict[str, Tensor]:
        """Map queries (B, C, P) to name -> (B, outputs, P)."""
        return {name: self.get_submodule(name)(query) for name in self.names}
