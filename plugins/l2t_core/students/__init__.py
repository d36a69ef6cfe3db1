"""What a field plugs in, and how it learns: a module on flat states, optimisers, s_t, measures."""
