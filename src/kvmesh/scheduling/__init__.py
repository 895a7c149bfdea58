"""Pure scheduling policies: they take state and return decisions. The router runs them live."""
