"""Translation recipes."""
