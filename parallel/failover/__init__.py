"""Failover: when workers die, living neighbours train what was theirs, and the run goes on (MeCeFO, arXiv 2510.16415)."""
