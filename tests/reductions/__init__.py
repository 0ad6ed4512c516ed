"""Each named method against the peers' own installed code, or its paper's formula."""
