"""Choose a spec: by a budget, by how near it comes to given updates, by singular values."""
