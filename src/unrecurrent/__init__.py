"""Find out whether a recurrent model needs to be recurrent."""
