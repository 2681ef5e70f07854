"""What acts: behaviour cloning, scripted policies, and adapters for the policies of LeRobot, SB3 and TorchRL."""

from policies.load import load_policy, policy_hash, shipped_policies

__all__ = ["load_policy", "policy_hash", "shipped_policies"]
