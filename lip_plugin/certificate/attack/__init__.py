"""Attacks that search for inputs which attain as much of a certificate as possible.

An attack gives a lower bound of a Lipschitz constant. Together with the certificate, which is an
upper bound, it shows how much of the certificate may be slack.
"""
