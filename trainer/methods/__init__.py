"""Methods: what adapts the attention of a backbone. One file each, found by its name in
`<level>/<name>.py`.

`method.py` holds the contract (`Method`, `Edit`) and the order of edits, `apply.py` the rules by
which methods compose or refuse each other, `shared/` what several methods have in common.
"""
