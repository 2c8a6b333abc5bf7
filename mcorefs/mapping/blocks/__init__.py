"""The vocabulary that families are written in: blocks, rules and config keys that many share."""
