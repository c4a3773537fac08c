"""Commands: one small file each; parse, call, print."""
