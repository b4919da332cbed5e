use super::*;

fn service(name: &str, port: u16) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: {port}}}]}}\n---\n"
    )
}

const BAD: &str =
    "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {ports: [{port: 0}]}\n";

fn update(set: &mut FileSet, files: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
    let texts = files.iter().map(|(path, text)| (PathBuf::from(path), Ok((*text).to_owned())));
    let loaded = set.update(texts.collect(), &BTreeMap::new());
    let resources = loaded.resources.values().map(|located| {
        let duet_api::resource::Resource::Service(service) = &located.resource else { panic!() };
        format!("{}:{}", service.metadata.name, service.spec.ports[0].port)
    });
    (resources.collect(), loaded.errors.iter().map(ToString::to_string).collect())
}

#[test]
fn a_file_with_an_error_stays_as_it_was_and_others_apply() {
    let mut set = FileSet::default();
    let good = [service("a", 1), service("b", 1)].concat();
    assert_eq!(update(&mut set, &[("x", &good), ("y", &service("c", 1))]).0, ["a:1", "b:1", "c:1"]);
    let broken = [service("a", 2), BAD.to_owned()].concat();
    let (resources, errors) = update(&mut set, &[("x", &broken), ("y", &service("c", 2))]);
    assert_eq!(resources, ["a:1", "b:1", "c:2"]);
    assert_eq!(errors.len(), 1);
    assert!(
        errors[0].starts_with("x:9:") && errors[0].contains("spec.ports[0].port"),
        "{errors:?}"
    );
    let again = update(&mut set, &[("x", &broken), ("y", &service("c", 2))]);
    assert_eq!(again, (resources, errors), "an error lasts until it is mended");
    let (resources, errors) = update(&mut set, &[("x", &service("a", 2)), ("y", &service("c", 2))]);
    assert_eq!((resources, errors), (vec!["a:2".into(), "c:2".into()], vec![]));
}

#[test]
fn a_file_that_never_was_good_gives_what_is_good_of_it() {
    let mut set = FileSet::default();
    let (resources, errors) =
        update(&mut set, &[("x", &[service("a", 1), BAD.to_owned()].concat())]);
    assert_eq!((resources, errors.len()), (vec!["a:1".to_owned()], 1));
}

#[test]
fn of_two_resources_of_one_name_the_older_stays_and_both_places_are_named() {
    let mut set = FileSet::default();
    update(&mut set, &[("b", &service("s", 1))]);
    let (resources, errors) = update(&mut set, &[("a", &service("s", 2)), ("b", &service("s", 1))]);
    assert_eq!(resources, ["s:1"]);
    assert_eq!(errors, ["a:3:18: metadata.name: Service default/s is already defined at b:1"]);
    let (resources, errors) = update(&mut set, &[("a", &service("s", 2))]);
    assert_eq!((resources, errors), (vec!["s:2".to_owned()], vec![]), "the name is free now");
}

#[test]
fn a_name_twice_in_one_file_is_an_error_of_the_file() {
    let mut set = FileSet::default();
    let (resources, errors) =
        update(&mut set, &[("a", &[service("s", 1), service("s", 2)].concat())]);
    assert_eq!(resources, ["s:1"]);
    assert!(errors[0].starts_with("a:8:") && errors[0].contains("defined at a:1"), "{errors:?}");
}

#[test]
fn a_resource_can_move_between_files_in_any_order() {
    let mut set = FileSet::default();
    update(&mut set, &[("a", &service("s", 1)), ("b", "")]);
    let moved = update(&mut set, &[("a", &service("s", 1)), ("b", &service("s", 2))]);
    assert_eq!((moved.0, moved.1.len()), (vec!["s:1".to_owned()], 1));
    let done = update(&mut set, &[("a", ""), ("b", &service("s", 2))]);
    assert_eq!(done, (vec!["s:2".to_owned()], vec![]));
}

#[test]
fn unreadable_files_and_folders_stay_and_deleted_ones_go() {
    let mut set = FileSet::default();
    update(&mut set, &[("d/a", &service("a", 1)), ("b", &service("b", 1))]);
    let failed = BTreeMap::from([(PathBuf::from("d"), "permission denied".to_owned())]);
    let loaded = set.update([(PathBuf::from("b"), Err("is odd".to_owned()))].into(), &failed);
    assert_eq!(loaded.resources.len(), 2);
    let errors: Vec<_> = loaded.errors.iter().map(ToString::to_string).collect();
    assert_eq!(
        errors,
        ["b:1:1: cannot be read: is odd", "d:1:1: cannot be read: permission denied"]
    );
    assert_eq!(update(&mut set, &[]), (vec![], vec![]));
}

#[test]
fn what_only_dapr_would_read_is_named_as_long_as_it_is_there() {
    let mut set = FileSet::default();
    let mut warned = |text: String| {
        let loaded = set.update([(PathBuf::from("a"), Ok(text))].into(), &BTreeMap::new());
        loaded.warnings.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    let daprs = "apiVersion: dapr.io/v1alpha1\nkind: Resiliency\nmetadata: {name: r}\n";
    for before in [service("a", 1), service("a", 1), service("a", 0), String::new()] {
        let warnings = warned(format!("{before}{daprs}"));
        let line = 2 + before.lines().count();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].starts_with(&format!("a:{line}:7: kind: ")), "{warnings:?}");
    }
    assert_eq!(warned(service("a", 1)), Vec::<String>::new());
}

#[test]
fn folders_are_read_recursively_without_hidden_names() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for folder in ["sub", "..data"] {
        fs::create_dir(at(folder)).unwrap();
    }
    for name in ["b.yaml", "sub/a.yml", "notes.txt", "..data/c.yaml", ".hidden.yaml"] {
        fs::write(at(name), "").unwrap();
    }
    std::os::unix::fs::symlink("..data/c.yaml", at("c.yaml")).unwrap();
    std::os::unix::fs::symlink(dir.path(), at("sub/circle")).unwrap();
    let scan = scan(&[dir.path().to_owned(), at("gone.yaml")]);
    let found: Vec<_> =
        scan.files.keys().map(|p| p.strip_prefix(dir.path()).unwrap().to_owned()).collect();
    assert_eq!(found, ["b.yaml", "c.yaml", "sub/a.yml"].map(PathBuf::from));
    assert!(scan.failed.contains_key(&at("gone.yaml")));
}
