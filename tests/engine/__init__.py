"""Tests of dynamickv/. Everything here runs offline on tiny random models, except what is marked
`model`."""
