"""The planner: what a cluster will do with a Llama, before anyone pays for it. No torch."""
