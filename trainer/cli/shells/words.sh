# Of the words on stdin those that begin with $1, each up to its next dot, once.
_attention_trainer_next() {
  local word rest seen=' '
  while IFS= read -r word; do
    case "$word" in "$1"*) ;; *) continue ;; esac
    rest=${word#"$1"}
    case "$1" in
      *=*) ;;  # a value stays whole
      *) case "${rest%%=*}" in *.*) word="$1${rest%%.*}." ;; esac ;;
    esac
    case "$seen" in *" $word "*) continue ;; esac
    seen="$seen$word "
    printf '%s\n' "$word"
  done
}
