"""Three ways to run a torch model op by op for the overflow search: aten calls, an exported graph, modules."""
