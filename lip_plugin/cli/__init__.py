"""The command `lip-plugin`: what it does with saved models, and the page it writes about a run.

Nothing in lip_plugin imports this folder.
"""
