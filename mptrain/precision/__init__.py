"""Mixed precision: fp32 masters, half compute weights, loss scaling."""

from mptrain.precision.loop import MasterWeights
from mptrain.precision.policy import LossScale, Policy
from mptrain.precision.sharded import ShardedMasters

__all__ = ["LossScale", "MasterWeights", "Policy", "ShardedMasters"]
