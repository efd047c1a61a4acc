"""The report of a run: one HTML page, or lines of text, made from its journal, configuration, ledger and checkpoints.

Every number stands in one of these files or follows from them by a rule that the page states. A journal is read in one
pass (`reading`), and once more for what is large (`matrices`); what is drawn is reduced to buckets (`buckets`).
"""
