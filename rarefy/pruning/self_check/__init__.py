"""The self-check: is the pruned network the one with those channels masked?"""
