"""Bayesian multi-type mean field multi-agent imitation learning, as a distributed actor-learner system.

The folders of the repository are this package's, by links: nothing but `bm3il` is installed.
"""
