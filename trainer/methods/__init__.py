"""Methods: what adapts the attention of a backbone. One file each, found by its name in
`<level>/<name>.py`.

This file holds the contract (`Method`, `Edit`), the order of edits, and the rules by which methods
compose or refuse.
"""
