"""Models that `describe` has never seen, for the tests."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block as in ResNet-18."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.relu = nn.ReLU()
        widens = before != after
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1), nn.BatchNorm2d(after)) if widens else None


class ResidualNet(nn.Module):
    """Four stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(), nn.MaxPool2d(3)
        for i, (before, after) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)], start=1):
            setattr(self, f"layer{i}", nn.Sequential(Block(before, after), Block(after, after)))
        self.fc = nn.Linear(64, 10)


class Oddity(nn.Module):
    """Bare parameters, buffers, a child that is shared, tied weights and something that holds nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.table = nn.Parameter(torch.zeros(3, 5))
        self.register_buffer("average", torch.zeros(7))
        self.first, self.nothing = nn.Linear(5, 5), Nothing()
        self.again = self.first
        self.tied = nn.Linear(5, 5, bias=False)
        self.tied.weight = self.first.weight


class Nothing(nn.Module):
    """A function of an unknown class."""

    def forward(self, x: Tensor) -> Tensor:
        """As it is."""
        return x


class OddSGD(torch.optim.SGD):
    """An optimizer that nobody knows."""


def residual_net() -> nn.Module:
    return ResidualNet()


def llama(layers: int = 30, device: str = "meta") -> nn.Module:
    """SmolLM2-135M by its shapes."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shapes = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3)
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=49152, tie_word_embeddings=True, **shapes)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def hope(**options: object) -> nn.Module:
    from nestlearn import HopeConfig, HopeForCausalLM

    shapes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    return HopeForCausalLM(HopeConfig(**{**shapes, "chunk_size": 8, **options}))
