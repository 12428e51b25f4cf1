"""Built-in datasets: emoji drawings, scenes and easy-VQA, with captions, questions and conversations."""
