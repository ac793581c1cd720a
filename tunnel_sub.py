#!/usr/bin/env python3
"""Launch a Mathematica compute kernel; all that it takes is in ``tunnel.py`` beside this file."""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # an embeddable Python does not

try:
    import tunnel
except (EOFError, TypeError, ValueError):  # its byte code was cut short, as on a disk that is full
    sys.implementation.cache_tag = None
    import tunnel


def main():
    return tunnel.main("tunnel_sub", tunnel.COMPUTE)


if __name__ == "__main__":
    sys.exit(main())
