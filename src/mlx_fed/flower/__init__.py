"""The only room that touches Flower's private modules.

``link`` holds the engine's state, ``routes`` serves the Fleet API over it, within ``bounds`` and to
whom the ``door`` lets in, ``grid`` carries messages between the round loop and that state, and
``client`` is a node's end of the wire. A new Flower release that moves something breaks
``tests/flower/test_flower.py`` first, by name.
"""
